// What one job leaves behind: events, log, checkpoints, attempts, scores, and the benchmark items with their pictures.

import { get } from "../api.js";
import { h, section, show, table } from "../dom.js";
import { TERMINAL, number, time } from "../format.js";
import { itemBrowser } from "./items.js";
import { scoreTable } from "./scores.js";

const MOST_EVENTS = 300;

export function jobOutputs(path, page) {
  const list = h("ol.events", { tabindex: "0", "aria-label": "Events, newest first" });
  const withNumbers = h("input", { type: "checkbox", id: "with-numbers" });
  const log = h("pre", { tabindex: "0", "aria-label": "The end of the trainer's log" });
  const logPart = h("details", null, h("summary", null, "Log of the trainer"), log);
  const parts = { checkpoints: h("div"), attempts: h("div"), scores: h("div") };
  const items = h("div");
  const element = h("div.page", null,
    h("div.columns", null,
      section("Events", null, h("div.filter", null, h("label", { for: "with-numbers" }, withNumbers, "with the numbers of the last steps")), list),
      section("Checkpoints", null, parts.checkpoints, h("h3", null, "Attempts"), parts.attempts)),
    parts.scores, items, section("Log", null, logPart));
  const events = [];
  let numbers = [];
  const drawEvents = () => {
    const wanted = [...events, ...(withNumbers.checked ? numbers : [])].sort((a, b) => b.seq - a.seq).slice(0, MOST_EVENTS);
    show(list, wanted.length ? wanted.map(shownEvent) : h("li", null, "", "Nothing has happened yet"));
  };
  /** The newest only: a long training has as many of them as steps. */
  const loadNumbers = async () => {
    if (!withNumbers.checked) return;
    numbers = (await get(`${path}/events`, { type: "metrics", limit: 100 }, page.signal)).data;
    drawEvents();
  };
  withNumbers.addEventListener("change", () => { drawEvents(); page.attempt(loadNumbers); });
  let scheduled = null;
  const addEvent = (event) => {
    events.push(event);
    scheduled ??= setTimeout(() => { scheduled = null; drawEvents(); }, 100);
  };
  drawEvents();

  const showLog = async () => {
    if (logPart.open) show(log, (await get(`${path}/logs`, {}, page.signal)).text || "Nothing printed yet");
  };
  logPart.addEventListener("toggle", () => page.attempt(showLog));

  const load = async (job) => {
    const [checkpoints, attempts] = await Promise.all([get(`${path}/checkpoints`, { limit: 100 }, page.signal), get(`${path}/attempts`, {}, page.signal)]);
    show(parts.checkpoints, checkpointTable(checkpoints.data, job));
    show(parts.attempts, attempts.data.length ? attemptTable(attempts.data) : h("p.small", null, "No worker has taken it yet"));
    show(parts.scores, job.scores.length || job.evaluation_error ? section("Scores", null, scoreTable(job)) : null);
    if (job.scores.length && !items.childElementCount) items.append(itemBrowser(job, page));
    await Promise.all([showLog(), loadNumbers()]);
  };
  return { element, load, addEvent };
}

function shownEvent(event) {
  return h(`li.${event.level}`, null, h("span.small", null, time(event.created_at)), h("span", null, event.level === "info" ? "" : h("strong", null, `${event.level}: `), event.message));
}

function checkpointTable(checkpoints, job) {
  if (!checkpoints.length) return h("p.small", null, TERMINAL.has(job.phase) ? "None is kept" : "None yet");
  return table("Checkpoints, newest first", [
    ["Step", (row) => number(row.step_number), "right"],
    ["Raw NLL", (row) => number(row.metrics.nll), "right"],
    ["Held-out NLL", (row) => number(row.metrics.valid_nll), "right"],
    ["Usable as", (row) => h("code", null, row.fine_tuned_model_checkpoint), "text"],
  ], checkpoints);
}

function attemptTable(attempts) {
  return table("Attempts", [
    ["No.", (row) => number(row.attempt)],
    ["Device", (row) => row.device],
    ["Started", (row) => time(row.started_at)],
    ["Ended", (row) => (row.ended_at ? `${time(row.ended_at)} ${row.exit_reason ?? ""}` : "runs")],
    ["Resumed from step", (row) => number(row.resumed_from_step), "right"],
  ], attempts);
}
