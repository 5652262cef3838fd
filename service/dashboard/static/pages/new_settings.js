// The settings of a new job, but for its objective. Empty fields are left to the service, whose defaults are the paper's.

import { h } from "../dom.js";
import { boxes, choice, field, ticked, typed } from "../form.js";

const NUMBERS = [
  ["n_epochs", "Epochs", "1"], ["batch_size", "Batch size", "auto"], ["learning_rate", "Learning rate", "5e-5"],
  ["max_steps", "Most steps", "all"], ["checkpoint_every_steps", "Steps between checkpoints", "auto"], ["max_length_tokens", "Most tokens of a row", "4096"],
];

/** template: the job whose settings are used again, or null; objective: an element that chooses it. */
export function settingsPart(models, benchmarks, { model, template }, objective) {
  const { adapter: adapterBefore, hyperparameters: given = {} } = template?.method.supervised ?? {};
  const before = template?.resolved_config.evaluation;
  const name = choice("model", models.map((each) => each.id), model ?? template?.model);
  const suffix = h("input", { id: "suffix", maxlength: "64", value: template?.suffix ?? "", placeholder: "such as geometry" });
  const seed = h("input", { id: "seed", type: "number", min: "0", value: template?.seed ?? "", placeholder: "random" });
  const priority = choice("priority", ["low", "normal", "high"], String(template?.priority ?? "normal"));
  const adapter = choice("adapter", [["", "the service's default"], ["full", "all weights"], ["lora", "LoRA"]], adapterBefore?.type);
  const numbers = NUMBERS.map(([key, title, standard]) => [key, title, h("input", { id: `h-${key}`, inputmode: "decimal", placeholder: standard, value: given[key] ?? "" })]);
  const scored = boxes("Score on benchmarks afterwards", "b", benchmarks.map((each) => each.id), before?.benchmarks.map((each) => each.name));
  const base = h("input", { type: "checkbox", id: "include-base", checked: true });
  const limit = h("input", { id: "limit", type: "number", min: "1", placeholder: "all" });
  scored.element.append(h("div.fields", null, field("Items of each", limit), h("div.choice", null, ticked(base, "score the model before the training too, to see flips"))));

  const element = h("div.page", null,
    objective,
    h("div.fields", null, field("Model", name), field("Suffix of the model's name", suffix), field("Priority", priority)),
    h("details", { open: Boolean(template) }, h("summary", null, "Hyperparameters"),
      h("div.fields", null, numbers.map(([, title, input]) => field(title, input)), field("Trains", adapter), field("Seed", seed))),
    benchmarks.length > 0 && scored.element);

  /** The job; objective: its part of method.supervised. */
  const body = (objective) => {
    const hyperparameters = Object.fromEntries(numbers.filter(([, , input]) => input.value.trim()).map(([key, , input]) => [key, typed(input.value)]));
    const supervised = { ...objective, ...(adapter.value && { adapter: { type: adapter.value } }), hyperparameters };
    const evaluation = { benchmarks: scored.chosen(), include_base: base.checked, ...(limit.value && { limit: Number(limit.value) }) };
    return {
      model: name.value, priority: priority.value, method: { type: "supervised", supervised },
      ...(suffix.value.trim() && { suffix: suffix.value.trim() }),
      ...(seed.value !== "" && { seed: Number(seed.value) }),
      ...(evaluation.benchmarks.length && { evaluation }),
    };
  };
  return { element, body, model: () => name.value };
}

/** Put the focus on the field that the service named; false where there is none. */
export function point(param) {
  const words = param?.split(".") ?? [];
  const ids = [`o-${words.slice(-2).join("-")}`, `h-${words.at(-1)}`, words.at(-1)].filter(Boolean);
  const input = words.length ? document.querySelector(ids.map((id) => `#${CSS.escape(id)}`).join()) : null;
  input?.closest("details")?.setAttribute("open", "");
  input?.focus();
  return Boolean(input);
}
