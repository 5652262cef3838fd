// What a preflight found: the verdict with its reasons, and the evidence by part of the answer.

import { h, table } from "../dom.js";
import { number, percent } from "../format.js";
import { drawParts } from "../histogram.js";

/** take(objective): puts the verdict into the form. */
export function preflightReport(report, take) {
  const { verdict } = report;
  return h("div.page", null,
    h("div.notice.good", { role: "status" }, h("p", null, "Suits this model and data: ", h("strong", null, verdict.label)), h("ul", null, verdict.reasons.map((reason) => h("li", null, reason))),
      h("button", { type: "button", onclick: () => take(verdict.objective) }, "Train with it")),
    h("p.small", null, `${number(report.num_rows)} of ${number(report.num_rows_total)} rows, ${verdict.rule}, on ${report.device}.`),
    table("What the model makes of the targets", [
      ["Part", (part) => part.part.replaceAll("_", " ")],
      ["Tokens", (part) => number(part.num_tokens), "right"],
      ["NLL", (part) => number(part.nll), "right"],
      ["Mean p", (part) => number(part.mean_p), "right"],
      ["p < 0.1", (part) => percent(part.share_p_below_01), "right"],
      ["p < 0.01", (part) => percent(part.share_p_below_001), "right"],
      ["Gradient DFT discards", (part) => percent(part.dft_discards), "right"],
    ], report.parts.filter((part) => part.num_tokens)),
    drawParts(report.parts.find((part) => part.part === "all")),
    lines("What would change the verdict", verdict.would_change), lines("What the rule cannot know", verdict.limits));
}

function lines(title, all) {
  return all.length ? h("details", null, h("summary", null, title), h("ul", null, all.map((line) => h("li", null, line)))) : null;
}
