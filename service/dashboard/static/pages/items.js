// Benchmark items as they were answered: picture, question, answer, what was extracted, the verdict, and the flips.

import { get, picture } from "../api.js";
import { empty, failure, h, phase, section, show } from "../dom.js";
import { choice } from "../form.js";
import { number } from "../format.js";

const PAGE = 6;
const FLIPS = [["", "all"], ["fixed", "fixed: wrong before, right now"], ["broken", "broken: right before, wrong now"], ["both_wrong", "wrong both times"], ["both_right", "right both times"]];

/** A part of a page that browses the items of a job or an evaluation; job has id and benchmarks or scores. */
export function itemBrowser(job, page) {
  const benchmarks = job.benchmarks ?? [...new Set(job.scores.map((score) => score.benchmark))];
  const roles = new Set((job.scores ?? []).map((score) => score.model_role));
  const benchmark = choice("items-benchmark", benchmarks, page.params.get("benchmark"));
  const role = choice("items-role", [["tuned", "after"], ["base", "before"]], page.params.get("role"));
  const verdict = choice("items-verdict", [["", "right and wrong"], ["true", "right"], ["false", "wrong"]], page.params.get("correct"));
  const flip = choice("items-flip", FLIPS, page.params.get("flip"));
  const text = h("input", { type: "search", id: "items-text", value: page.params.get("q") ?? "" });
  const list = h("ul.items");
  const counts = h("p.small", { "aria-live": "polite" });
  const more = h("button", { type: "button", hidden: true }, "Show more items");
  let after = null;
  let asked = 0;

  const load = async (fresh) => {
    const mine = ++asked;
    const query = { benchmark: benchmark.value, role: role.value, correct: verdict.value, flip: flip.value, q: text.value, against: page.params.get("against"), limit: PAGE };
    page.setParams({ ...query, limit: null });
    if (fresh) after = null;
    try {
      const found = await get(`/v1/evaluations/${encodeURIComponent(job.id)}/items`, { ...query, after }, page.signal);
      if (mine !== asked) return;
      const shown = found.data.map((item) => shownItem(item, page));
      if (!fresh) list.append(...shown);
      else list.replaceChildren(...(shown.length ? shown : [h("li", null, empty("No item matches", h("p", null, "Choose other filters above.")))]));
      show(counts, told(found.counts));
      more.hidden = !found.has_more;
      after = found.last_id;
    } catch (error) {
      if (!page.signal.aborted) list.replaceChildren(h("li", null, failure(error, { retry: () => load(true) })));
    }
  };
  for (const input of [benchmark, role, verdict, flip]) input.addEventListener("change", () => load(true));
  text.addEventListener("change", () => load(true));
  more.addEventListener("click", () => load(false));
  load(true);
  const both = page.params.has("against") || (roles.has("base") && roles.has("tuned"));
  return section("Items", null,
    h("div.filter", null,
      benchmarks.length > 1 && labelled("Benchmark", benchmark), both && labelled("Model", role), labelled("Verdict", verdict),
      both && labelled("Flips", flip), labelled("Text", text)),
    counts, list, more);
}

function labelled(title, input) {
  return h("span.row", null, h("label", { for: input.id }, title), input);
}

function told(counts) {
  if (!counts) return "";
  const flips = counts.fixed + counts.broken + counts.both_right + counts.both_wrong;
  const against = flips ? `; against before: ${number(counts.fixed)} fixed, ${number(counts.broken)} broken` : "";
  return `${number(counts.correct)} of ${number(counts.total)} right${against}`;
}

/** One item with all that was said of it. */
function shownItem(item, page) {
  const answer = item.prediction;
  return h("li.item", null,
    h("div.row", null, phase(item.correct ? "correct" : "wrong"), item.flip && h("span.small", null, item.flip.replaceAll("_", " ")), h("span.small", null, item.item_id ?? answer.id)),
    item.image_url && keyedPicture(item.image_url, `Picture of item ${item.item_id}`, page),
    h("p", null, item.question ?? answer.prompt),
    options(item.options ?? {}),
    h("dl.facts.narrow-facts", null, pair("Reference", answer.answer), pair("Extracted", answer.extracted ?? "nothing"), pair("Rule", answer.rule), pair("Ended by", answer.finish_reason)),
    answered("Answer", answer, item.item_id),
    item.before && answered(`Before: ${item.before.correct ? "right" : "wrong"}, extracted ${item.before.extracted ?? "nothing"}`, item.before, item.item_id));
}

function pair(name, value) {
  return h("div", null, h("dt", null, name), h("dd", null, value));
}

function options(all) {
  const letters = Object.entries(all);
  return letters.length ? h("ul", null, letters.map(([letter, text]) => h("li", null, `${letter}: ${text}`))) : null;
}

function answered(title, answer, id) {
  return [h("h3", null, title), h("pre", { tabindex: "0", role: "region", "aria-label": `${title} to ${id}` }, answer.error ?? (answer.prediction || "(nothing)"))];
}

/** An <img> whose bytes are fetched with the key; it says so where there is none. */
export function keyedPicture(path, alt, page, kind = "picture") {
  const image = h(`img.${kind}`, { alt });
  picture(path, page.signal).then(
    (address) => {
      image.src = address;
      page.signal.addEventListener("abort", () => URL.revokeObjectURL(address));
    },
    (error) => page.signal.aborted || image.replaceWith(h("p.small", null, `The picture cannot be shown: ${error.message}`)),
  );
  return image;
}
