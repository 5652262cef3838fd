// What the model answers to a few rows of its own data: before the training, and at the step that a slider chooses.

import { get } from "../api.js";
import { empty, failure, h, section, show } from "../dom.js";
import { TERMINAL, number } from "../format.js";
import { keyedPicture } from "./items.js";

export function jobSamples(path, page) {
  const slider = h("input", { type: "range", id: "samples-step", min: "0", max: "0", value: "0", step: "1" });
  const label = h("label", { for: "samples-step" }, "Step");
  const about = h("p.small", { "aria-live": "polite" });
  const chooser = h("div", { hidden: true }, about, label, slider);
  const trouble = h("div");
  const list = h("ul.items");
  const cards = new Map();
  const answers = new Map();
  let steps = [];
  let attempt = null;

  /** Answers at a step, kept until there are new ones: then the last ones are whole, or another attempt's. */
  const at = async (step) => {
    if (!answers.has(step)) answers.set(step, (await get(`${path}/samples`, { step }, page.signal)).data);
    return answers.get(step);
  };
  const draw = async () => {
    const step = steps[Number(slider.value)];
    slider.setAttribute("aria-valuetext", `step ${step}`);
    show(label, `Step ${number(step)} of ${number(steps.at(-1))}`);
    try {
      const [first, now] = [await at(steps[0]), await at(step)];
      if (steps[Number(slider.value)] !== step) return;  // moved on meanwhile
      show(trouble);
      show(about, told(now));
      for (const sample of now) {
        if (!cards.has(sample.row_id)) {
          cards.set(sample.row_id, card(sample, page));
          list.append(cards.get(sample.row_id).element);
        }
        cards.get(sample.row_id).say(sample, first.find((one) => one.row_id === sample.row_id));
      }
    } catch (error) {
      if (!page.signal.aborted) show(trouble, failure(error, draw));
    }
  };
  slider.addEventListener("input", draw);

  const load = async (job) => {
    const found = await get(`${path}/samples`, {}, page.signal);
    if (attempt !== job.attempt || steps.length !== found.steps.length) answers.clear();
    attempt = job.attempt;
    const atEnd = slider.value === slider.max;
    steps = found.steps;
    chooser.hidden = !steps.length;
    if (!steps.length) return show(trouble, nothing(job));
    answers.set(steps.at(-1), found.data);
    slider.max = String(steps.length - 1);
    if (atEnd) slider.value = slider.max;
    await draw();
  };
  return { element: section("Samples", null, chooser, trouble, list), load };
}

function told(samples) {
  const file = samples[0]?.split === "held_out" ? "held-out" : "training";
  return `The first rows of the ${file} file (${number(samples.length)}), answered with the weights as they were: always the likeliest token.`;
}

function nothing(job) {
  if (!job.resolved_config.train?.sample_rows) return empty("No rows are answered in this training", h("p", null, "Its sample_rows is 0."));
  if (TERMINAL.has(job.phase)) return empty("No row was answered", h("p", null, "The job ended before that, no row has a turn to answer, or its files are not kept any more."));
  return empty("No row was answered yet", h("p", null, "The first answers come once the model is loaded, before the first step."));
}

/** A row: what it asks and wants stays, say(now, first) shows what was answered. */
function card(sample, page) {
  const parts = sample.prompt.flatMap((turn) => turn.content);
  const pictures = parts.filter((part) => part.type === "image");
  const text = (turn) => turn.content.map((part) => part.text ?? (pictures.length > 1 ? `[picture ${pictures.indexOf(part) + 1}] ` : "")).join("");
  const earlier = sample.prompt.slice(0, -1);
  const said = h("div");
  const element = h("li.item", null,
    h("p.small", null, sample.row_id),
    pictures.length > 0 && h("div.pictures", null, pictures.map((part, place) => keyedPicture(part.image_url, `Picture ${place + 1} of ${sample.row_id}`, page))),
    earlier.length > 0 && h("details", null, h("summary", null, `Before it: ${earlier.map((turn) => turn.role).join(", ")}`), earlier.map((turn) => [h("h3", null, turn.role), quoted(`${turn.role} of ${sample.row_id}`, text(turn))])),
    h("h3", null, "Question"), quoted(`Question of ${sample.row_id}`, text(sample.prompt.at(-1))),
    h("h3", null, "Reference"), quoted(`Reference of ${sample.row_id}`, sample.reference),
    said);
  const say = (now, first) => show(said, first && first.step !== now.step && answered("Before the training", first), answered(now.step ? `After step ${number(now.step)}` : "Before the training", now));
  return { element, say };
}

function answered(title, sample) {
  const tokens = `${sample.finish_reason === "length" ? "cut after " : ""}${number(sample.num_tokens)} ${sample.num_tokens === 1 ? "token" : "tokens"}`;
  return [h("h3", null, title, " ", h("span.small", null, tokens)), quoted(`${title}: answer to ${sample.row_id}`, sample.error ?? sample.answer)];
}

function quoted(label, text) {
  return h("pre", { tabindex: "0", role: "region", "aria-label": label }, text.trim() ? text : text ? "(only blank space)" : "(nothing)");
}
