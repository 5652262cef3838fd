// The settings of a new job. Empty fields are left to the service, whose defaults are the paper's.

import { h, show } from "../dom.js";

const OBJECTIVES = [
  ["dft", "dft: each token weighted by its own probability (the paper's)"],
  ["nll", "nll: plain SFT"],
  ["power", "power: weight p^alpha"],
  ["dft_nll", "dft_nll: dft blended with nll"],
];
/** Options of an objective that have a field: name, title, default. */
const OPTIONS = { dft: ["weight_floor", "Smallest weight", "0"], power: ["alpha", "Alpha", "1"], dft_nll: ["nll_share", "Share of nll", "0.1"] };
const NUMBERS = [
  ["n_epochs", "Epochs", "1"], ["batch_size", "Batch size", "auto"], ["learning_rate", "Learning rate", "5e-5"],
  ["max_steps", "Most steps", "all"], ["checkpoint_every_steps", "Steps between checkpoints", "auto"], ["max_length_tokens", "Most tokens of a row", "4096"],
];

export function settingsPart(models, benchmarks, { model, template }) {
  const wanted = model ?? template?.model;
  const name = choice("model", models.map((each) => [each.id, each.id]), wanted);
  const objective = choice("objective", OBJECTIVES, template?.objective ?? "dft");
  const option = h("div.field");
  const suffix = h("input", { id: "suffix", maxlength: "64", value: template?.suffix ?? "", placeholder: "such as geometry" });
  const seed = h("input", { id: "seed", type: "number", min: "0", value: template?.seed ?? "", placeholder: "random" });
  const priority = choice("priority", ["low", "normal", "high"].map((each) => [each, each]), template?.priority ?? "normal");
  const adapter = choice("adapter", [["", "the service's default"], ["full", "all weights"], ["lora", "LoRA"]], template?.method.supervised.adapter?.type ?? "");
  const given = template?.method.supervised.hyperparameters ?? {};
  const numbers = NUMBERS.map(([key, title, standard]) => [key, h("input", { id: `h-${key}`, inputmode: "decimal", placeholder: standard, value: given[key] ?? "" }), title]);
  const scoredBefore = new Set((template?.resolved_config.evaluation?.benchmarks ?? []).map((each) => each.name));
  const boxes = benchmarks.map((each) => h("input", { type: "checkbox", id: `b-${each.id}`, value: each.id, checked: scoredBefore.has(each.id) }));
  const base = h("input", { type: "checkbox", id: "include-base", checked: true });
  const limit = h("input", { id: "limit", type: "number", min: "1", placeholder: "all" });
  const drawOption = () => {
    const [key, title, standard] = OPTIONS[objective.value] ?? [];
    const before = template?.method.supervised[objective.value]?.[key];
    show(option, key ? [h("label", { for: "option" }, title), h("input", { id: "option", inputmode: "decimal", placeholder: standard, value: before ?? "" })] : null);
  };
  objective.addEventListener("change", drawOption);
  drawOption();

  const objectiveField = field("Objective", objective);
  const element = h("div.page", null,
    h("div.fields", null, field("Model", name), objectiveField, option, field("Suffix of the model's name", suffix), field("Priority", priority)),
    h("details", { open: Boolean(template) }, h("summary", null, "Hyperparameters"),
      h("div.fields", null, numbers.map(([, input, title]) => field(title, input)), field("Trains", adapter), field("Seed", seed))),
    benchmarks.length > 0 && h("fieldset", null, h("legend", null, "Score on benchmarks afterwards"),
      h("div.choice", null, boxes.map((box) => h("label", { for: box.id }, box, box.value))),
      h("div.fields", null, field("Items of each", limit), h("div.choice", null, h("label", { for: "include-base" }, base, "score the model before the training too, to see flips")))));

  const body = () => {
    const typed = numbers.filter(([, input]) => input.value.trim()).map(([key, input]) => [key, value(input.value)]);
    const [key] = OPTIONS[objective.value] ?? [];
    const chosen = option.querySelector("input")?.value.trim();
    const supervised = {
      objective: objective.value,
      ...(key && chosen && { [objective.value]: { [key]: value(chosen) } }),
      ...(adapter.value && { adapter: { type: adapter.value } }),
      hyperparameters: Object.fromEntries(typed),
    };
    const scored = boxes.filter((box) => box.checked).map((box) => box.value);
    const evaluation = { benchmarks: scored, include_base: base.checked, ...(limit.value && { limit: Number(limit.value) }) };
    return {
      model: name.value, priority: priority.value, method: { type: "supervised", supervised },
      ...(suffix.value.trim() && { suffix: suffix.value.trim() }),
      ...(seed.value !== "" && { seed: Number(seed.value) }),
      ...(scored.length && { evaluation }),
    };
  };
  /** For a comparison, whose arms have their own. */
  const withoutObjective = () => {
    objectiveField.remove();
    option.remove();
  };
  return { element, body, model: () => name.value, withoutObjective, point };
}

function choice(id, options, chosen) {
  const select = h("select", { id }, options.map(([value, title]) => h("option", { value }, title)));
  if (chosen && ![...select.options].some((option) => option.value === chosen)) select.append(h("option", { value: chosen }, chosen));
  if (chosen !== undefined && chosen !== null) select.value = chosen;
  return select;
}

function field(title, input) {
  return h("div.field", null, h("label", { for: input.id }, title), input);
}

/** A number where it is one; else as typed, for the service to refuse with its reason. */
function value(text) {
  return Number.isFinite(Number(text)) ? Number(text) : text.trim();
}

/** Put the focus on the field that the service named; false where there is none. */
function point(param) {
  const last = param?.split(".").at(-1);
  const input = last && document.querySelector(`#h-${CSS.escape(last)}, #${CSS.escape(last)}`);
  input?.closest("details")?.setAttribute("open", "");
  input?.focus();
  return Boolean(input);
}
