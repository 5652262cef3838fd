// A new job, in four parts that open as the one before is done: data, settings, checks, submit.

import { get, post } from "../api.js";
import { failure, h, show } from "../dom.js";
import { jobChecks } from "./new_checks.js";
import { dataPart } from "./new_data.js";
import { settingsPart } from "./new_settings.js";

export async function render(root, page) {
  page.title("New job");
  const from = page.params.get("from");
  const [models, benchmarks, template] = await Promise.all([
    get("/v1/models", {}, page.signal),
    get("/v1/benchmarks", {}, page.signal),
    from ? get(`/v1/fine_tuning/jobs/${encodeURIComponent(from)}`, {}, page.signal) : null,
  ]);
  const settings = settingsPart(models.data, benchmarks.data, { model: page.params.get("model"), template });
  const chosen = { file: null };
  const checks = jobChecks(page, () => body());
  const trouble = h("div");
  const submit = h("button.primary", { type: "button", id: "submit", disabled: true }, "Submit the job");
  const note = h("p.help", { id: "submit-note" });
  submit.setAttribute("aria-describedby", "submit-note");

  const body = () => ({ ...settings.body(), training_file: chosen.file?.id, ...(data.heldOut() && { validation_file: data.heldOut() }) });
  const changed = () => {
    const ready = chosen.file?.status === "processed" && models.data.length > 0;
    submit.disabled = !ready;
    checks.enable(ready);
    show(note, ready ? "Nothing is queued unless everything in the request can be done." : "A checked training file comes first.");
  };
  const data = dataPart(page, { first: page.params.get("file") ?? template?.training_file, heldOut: template?.validation_file, model: () => settings.model() }, (file) => {
    chosen.file = file;
    page.setParams({ file: file?.id });
    checks.reset();
    changed();
  });
  submit.addEventListener("click", async () => {
    submit.disabled = true;
    try {
      const job = await post("/v1/fine_tuning/jobs", body());
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      show(trouble, failure({ ...error, message: error.message, title: "Nothing was queued. " }));
      if (!settings.point(error.param)) trouble.firstChild.scrollIntoView({ block: "nearest" });
      submit.disabled = false;
    }
  });
  changed();
  root.replaceChildren(
    h("div.head", null, h("h1", null, "New job")),
    part("1", "Data", data.element),
    part("2", "Settings", settings.element),
    part("3", "Look before you train", checks.element),
    part("4", "Submit", trouble, note, h("p", null, submit)),
  );
  await data.start();
}

function part(count, title, ...children) {
  const id = `part-${count}`;
  return h("section.card", { "aria-labelledby": id }, h("h2", { id }, `${count}. ${title}`), ...children);
}
