// The report card of a job that has ended: whether it passes its gate, and the card and bundle to take away.

import { download, optional } from "../api.js";
import { h, section } from "../dom.js";
import { TERMINAL, number, short } from "../format.js";

export function jobReport(path, page) {
  const element = h("div");
  const trouble = h("div");
  const take = (what, name) => () => page.ask(trouble, () => download(`${path}/${what}`, name));
  let shown = false;
  const load = async (job) => {
    if (shown || !TERMINAL.has(job.phase)) return;
    const report = await optional(`${path}/report`, {}, page.signal);
    shown = true;
    if (!report) return;
    const name = short(job.id).replace("…", "");
    element.replaceChildren(section("Report card", null,
      report.gate && gate(report.gate),
      h("div.actions", null,
        h("button", { type: "button", onclick: take("report.html", `report-${name}.html`) }, "Report as a page"),
        h("button", { type: "button", onclick: take("report", `report-${name}.json`) }, "Report as JSON"),
        h("button", { type: "button", onclick: take("bundle", `bundle-${name}.tar.gz`) }, "Bundle to train it again")),
      trouble));
  };
  return { element, load };
}

function gate(result) {
  return h(`div.notice.${result.passed ? "good" : "bad"}`, null,
    h("p", null, h("strong", null, result.passed ? "Passes its gate. " : "Does not pass its gate. ")),
    h("ul", null, result.checks.map((check) => h("li", null, `${check.passed ? "passed" : "failed"}: ${check.benchmark}, ${check.reason} (measured ${number(check.measured)})`))));
}
