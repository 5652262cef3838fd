// Models: what can be tuned and scored, and scoring one alone.

import { call, get, submission } from "../api.js";
import { empty, failure, h, section, show, table } from "../dom.js";
import { boxes, choice, field } from "../form.js";
import { time } from "../format.js";

export async function render(root, page) {
  page.title("Models");
  const rows = h("div.page");
  const trouble = h("div");
  const load = async () => {
    const models = (await get("/v1/models", {}, page.signal)).data;
    const own = models.filter((model) => model.source === "tuned");
    show(rows, section("Fine-tuned", null, own.length ? ownTable(own, remove) : empty("No fine-tuned model yet", h("p", null, "A job that succeeds makes one."))),
      section("Base", null, baseTable(models.filter((model) => model.source !== "tuned"))));
    return models;
  };
  const remove = async (model) => {
    if (!confirm(`Delete ${model.id} and its weights? This cannot be taken back.`)) return;
    await page.ask(trouble, async () => {
      await call("DELETE", `/v1/models/${model.id.split("/").map(encodeURIComponent).join("/")}`);
      await load();
    });
  };
  const models = await load();
  const benchmarks = (await get("/v1/benchmarks", {}, page.signal)).data;
  root.replaceChildren(h("div.head", null, h("h1", null, "Models")), trouble, rows, scoring(page, models, benchmarks));
  page.every(10, load);
}

function ownTable(models, remove) {
  return table("Fine-tuned models, newest first", [
    ["Name", (model) => h("code", null, model.id), "text"],
    ["From", (model) => model.parent ?? model.root],
    ["Objective", (model) => model.objective ?? "–"],
    ["Job", (model) => h("a", { href: `#/jobs/${model.job_id}` }, "its job")],
    ["Made", (model) => time(model.created)],
    ["", (model) => h("div.actions", null, h("a.button", { href: `#/new?model=${encodeURIComponent(model.id)}` }, "Train on"), h("button.danger", { type: "button", onclick: () => remove(model), "aria-label": `Delete ${model.id}` }, "Delete"))],
  ], models);
}

function baseTable(models) {
  if (!models.length) return empty("No base model", h("p", null, "Put a directory with a config.json under VLM_DFT_MODELS_DIR."));
  return table("Base models", [
    ["Name", (model) => h("code", null, model.id), "text"],
    ["Comes from", (model) => (model.source === "hub" ? "the hub, on first use" : "this server")],
    ["", (model) => h("a.button", { href: `#/new?model=${encodeURIComponent(model.id)}` }, "Train")],
  ], models);
}

function scoring(page, models, benchmarks) {
  if (!benchmarks.length) return section("Score a model", null, empty("No benchmark on this server", h("p", null, "vlm-dft benchmarks add puts one there.")));
  const model = choice("score-model", models.map((each) => each.id));
  const post = submission();
  const limit = h("input", { id: "score-limit", type: "number", min: "1", placeholder: "all" });
  const scored = boxes("Benchmarks", "score", benchmarks.map((each) => each.id));
  const trouble = h("div");
  const submit = async (event) => {
    event.preventDefault();
    const chosen = scored.chosen();
    if (!chosen.length) return show(trouble, failure({ message: "Choose at least one benchmark." }));
    await page.ask(trouble, async () => {
      const made = await post("/v1/evaluations", { model: model.value, benchmarks: chosen, ...(limit.value && { limit: Number(limit.value) }) });
      location.hash = `#/evaluations/${made.id}`;
    });
  };
  return section("Score a model", null, h("form.page", { onsubmit: submit },
    h("div.fields", null, field("Model", model), field("Items of each benchmark", limit)),
    scored.element,
    trouble, h("p", null, h("button.primary", { type: "submit" }, "Score"))));
}
