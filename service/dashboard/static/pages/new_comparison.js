// Asks for a comparison: one job, and the objectives that are to compete on it.

import { get, post } from "../api.js";
import { empty, failure, h, section, show } from "../dom.js";
import { time } from "../format.js";
import { settingsPart } from "./new_settings.js";

export async function comparisonForm(page) {
  const [models, benchmarks, files] = await Promise.all([
    get("/v1/models", {}, page.signal), get("/v1/benchmarks", {}, page.signal), get("/v1/files", { purpose: "fine-tune", limit: 100 }, page.signal),
  ]);
  const ready = files.data.filter((file) => file.status === "processed");
  if (!ready.length) return section("New comparison", null, empty("A checked training file comes first", h("a.button", { href: "#/new" }, "Upload one")));
  const settings = settingsPart(models.data, benchmarks.data, {});
  const file = h("select", { id: "comparison-file" }, ready.map((each) => h("option", { value: each.id }, `${each.filename}, ${time(each.created_at)}`)));
  const arms = ["nll", "dft", "power", "dft_nll"].map((name) => h("input", { type: "checkbox", id: `arm-${name}`, value: name, checked: ["nll", "dft"].includes(name) }));
  const rates = h("input", { id: "rates", placeholder: "as above; several with spaces sweep", "aria-describedby": "rates-help" });
  const trouble = h("div");
  const submit = async (event) => {
    event.preventDefault();
    const { method, suffix: _, ...job } = settings.body();
    const { objective: __, ...supervised } = method.supervised;
    const grid = { objective: arms.filter((arm) => arm.checked).map((arm) => arm.value), ...(rates.value.trim() && { learning_rate: rates.value.trim().split(/\s+/).map(Number) }) };
    try {
      const made = await post("/v1/fine_tuning/comparisons", { job: { ...job, training_file: file.value, method: { type: "supervised", supervised } }, grid });
      location.hash = `#/comparisons/${made.id}`;
    } catch (error) {
      show(trouble, failure({ ...error, message: error.message, title: "Nothing was queued. " }));
    }
  };
  settings.withoutObjective();
  return section("New comparison", null, h("form.page", { onsubmit: submit },
    h("div.field", null, h("label", { for: "comparison-file" }, "Training file"), file),
    settings.element,
    h("fieldset", null, h("legend", null, "Arms"), h("div.choice", null, arms.map((arm) => h("label", { for: arm.id }, arm, arm.value)))),
    h("div.field", null, h("label", { for: "rates" }, "Learning rates"), rates, h("p.help", { id: "rates-help" }, "Every objective is trained at each of them.")),
    trouble, h("p", null, h("button.primary", { type: "submit" }, "Train all arms"))));
}
