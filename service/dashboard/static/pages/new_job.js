// A new job or a comparison of several, in four parts that open as the one before is done: data, settings, checks, submit.

import { get, submission } from "../api.js";
import { h, show } from "../dom.js";
import { ticked } from "../form.js";
import { armsPart } from "./new_arms.js";
import { jobChecks } from "./new_checks.js";
import { dataPart } from "./new_data.js";
import { point, settingsPart } from "./new_settings.js";
import { allObjectives, oneObjective } from "./objectives.js";

export async function render(root, page) {
  const from = page.params.get("from");
  const [models, benchmarks, objectives, template] = await Promise.all([
    get("/v1/models", {}, page.signal),
    get("/v1/benchmarks", {}, page.signal),
    allObjectives(page),
    from ? get(`/v1/fine_tuning/jobs/${encodeURIComponent(from)}`, {}, page.signal) : null,
  ]);
  const one = oneObjective(objectives, template?.method.supervised);
  const arms = armsPart(objectives);
  const kind = kindOf(page, one.element, arms.element);
  const settings = settingsPart(models.data, benchmarks.data, { model: page.params.get("model"), template }, kind.element);
  const chosen = { file: null };
  const post = submission();
  const trouble = h("div");
  const note = h("p.help", { id: "submit-note" });
  const submit = h("button.primary", { type: "button", id: "submit", disabled: true, "aria-describedby": "submit-note" });
  const heading = h("h1");

  const body = (objective) => ({ ...settings.body(objective), training_file: chosen.file?.id, ...(data.heldOut() && { validation_file: data.heldOut() }) });
  const checks = jobChecks(page, () => body(kind.compares() ? arms.first() : one.chosen()), (objective) => { kind.one(); one.choose(objective); });
  const changed = () => {
    const ready = chosen.file?.status === "processed" && models.data.length > 0;
    submit.disabled = !ready;
    checks.enable(ready);
    show(note, ready ? "Nothing is queued unless everything in the request can be done." : "A checked training file comes first.");
  };
  const named = () => {
    page.title(kind.compares() ? "New comparison" : "New job");
    show(heading, kind.compares() ? "New comparison" : "New job");
    show(submit, kind.compares() ? "Train all arms" : "Submit the job");
  };
  kind.element.addEventListener("change", named);
  const data = dataPart(page, { first: page.params.get("file") ?? template?.training_file, heldOut: template?.validation_file, model: () => settings.model() }, (file) => {
    chosen.file = file;
    page.setParams({ file: file?.id });
    checks.reset();
    changed();
  });
  submit.addEventListener("click", async () => {
    submit.disabled = true;
    const refused = (error) => point(error.param) || trouble.firstChild?.scrollIntoView({ block: "nearest" });
    await page.ask(trouble, async () => {
      if (kind.compares()) location.hash = `#/comparisons/${(await post("/v1/fine_tuning/comparisons", arms.body(body()))).id}`;
      else location.hash = `#/jobs/${(await post("/v1/fine_tuning/jobs", body(one.chosen()))).id}`;
    }, { title: "Nothing was queued. ", refused });
    submit.disabled = false;
  });
  named();
  changed();
  root.replaceChildren(
    h("div.head", null, heading),
    part("1", "Data", data.element),
    part("2", "Settings", settings.element),
    part("3", "Look before you train", checks.element),
    part("4", "Submit", trouble, note, h("p", null, submit)),
  );
  await data.start();
}

/** One job, or a comparison; what belongs to the other is hidden. */
function kindOf(page, ofJob, ofComparison) {
  const radio = (id, checked) => h("input", { type: "radio", name: "kind", id, value: id, checked });
  const compare = radio("compare", page.params.has("compare"));
  const job = radio("one-job", !compare.checked);
  const draw = () => {
    ofJob.hidden = compare.checked;
    ofComparison.hidden = !compare.checked;
    page.setParams({ compare: compare.checked && "1" });
  };
  const choice = h("fieldset", { onchange: draw }, h("legend", null, "What to train"),
    h("div.choice", null, ticked(job, "one job"), ticked(compare, "a comparison: several objectives on equal terms")));
  draw();
  return { element: h("div.page", null, choice, ofJob, ofComparison), compares: () => compare.checked, one: () => job.click() };
}

function part(count, title, ...children) {
  const id = `part-${count}`;
  return h("section.card", { "aria-labelledby": id }, h("h2", { id }, `${count}. ${title}`), ...children);
}
