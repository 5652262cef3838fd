// Evaluations without a training: a list, and one of them with its scores and items.

import { get, post } from "../api.js";
import { empty, facts, h, phase, progress, section, show, table } from "../dom.js";
import { TERMINAL, duration, number, place, reason, short, time } from "../format.js";
import { itemBrowser } from "./items.js";
import { covered, shownScore } from "./scores.js";

export async function renderList(root, page) {
  page.title("Evaluations");
  const rows = h("div");
  const load = async () => {
    const [alone, jobs] = await Promise.all([get("/v1/evaluations", { limit: 50 }, page.signal), get("/v1/fine_tuning/jobs", { limit: 50 }, page.signal)]);
    const trained = jobs.data.filter((job) => job.scores.length);
    const all = [...alone.data.map((row) => ({ ...row, href: `#/evaluations/${row.id}` })), ...trained.map((job) => ({ ...job, href: `#/jobs/${job.id}` }))];
    all.sort((a, b) => b.created_at - a.created_at);
    show(rows, all.length ? evaluationTable(all) : empty("No evaluations yet", h("p", null, "Ask for benchmarks with a job, or score a model alone on the page Models."), h("a.button", { href: "#/models" }, "Models")));
  };
  await load();
  root.replaceChildren(h("div.head", null, h("h1", null, "Evaluations")), section("Scored models", null, rows));
  page.every(3, load);
}

function evaluationTable(rows) {
  return table("Evaluations, newest first", [
    ["Evaluation", (row) => h("a", { href: row.href }, short(row.id))],
    ["Model", (row) => row.fine_tuned_model ?? row.model, "text"],
    ["Phase", (row) => phase(row.phase)],
    ["Scores", (row) => (row.scores.length ? row.scores.map((score) => h("div", null, `${score.benchmark}${score.model_role === "base" && row.fine_tuned_model ? " before" : ""}: ${shownScore(score)}`)) : (row.benchmarks ?? []).join(", "))],
    ["Created", (row) => time(row.created_at)],
  ], rows);
}

/** The items of a job or an evaluation, alone: where comparisons lead. */
export async function renderItems(root, page, id) {
  page.title(`Items of ${short(id)}`);
  const isJob = id.startsWith("ftjob-");
  const found = await get(`/v1/${isJob ? "fine_tuning/jobs" : "evaluations"}/${encodeURIComponent(id)}`, {}, page.signal);
  const against = page.params.get("against");
  show(root,
    h("div.head", null, h("h1", null, `Items of ${found.fine_tuned_model ?? found.model}`), h("a.button", { href: isJob ? `#/jobs/${id}` : `#/evaluations/${id}` }, isJob ? "The job" : "The evaluation")),
    against && h("p", null, "Before is what ", h("a", { href: `#/jobs/${against}` }, "the reference"), " answered."),
    itemBrowser(found, page));
}

export async function render(root, page, id) {
  const path = `/v1/evaluations/${encodeURIComponent(id)}`;
  let evaluation = await get(path, {}, page.signal);
  const head = h("div.head");
  const trouble = h("div");
  const state = h("div");
  const scores = h("div");
  const items = h("div");
  const cancel = () => page.ask(trouble, async () => { evaluation = await post(`${path}/cancel`); draw(); });
  const draw = () => {
    page.title(`${evaluation.phase} ${short(id)}`);
    const ended = TERMINAL.has(evaluation.phase);
    show(head, h("h1", null, `Evaluation of ${evaluation.model} `, phase(evaluation.phase)), !ended && h("button.danger", { type: "button", onclick: cancel }, "Cancel"));
    show(state, told(evaluation));
    show(scores, evaluation.scores.length ? scoresOf(evaluation.scores) : null);
    if (evaluation.scores.length && !items.childElementCount) items.append(itemBrowser(evaluation, page));
  };
  draw();
  root.replaceChildren(head, trouble, section("State", null, state), scores, items);
  page.every(2, async () => {
    evaluation = await get(path, {}, page.signal);
    draw();
    return !TERMINAL.has(evaluation.phase);
  });
}

function told(evaluation) {
  const p = evaluation.progress;
  return [
    evaluation.error && h("p.notice.bad", { role: "alert" }, evaluation.error.message),
    evaluation.queue && h("p.notice.warn", null, `${place(evaluation.queue)} in the queue: ${reason(evaluation.queue)}`),
    p && !TERMINAL.has(evaluation.phase) && h("div", null, progress(p.percent, "Progress"), h("p.small", null, `${p.benchmark ?? ""} ${number(p.items_done)} of ${number(p.items_total)} items, ${duration(p.seconds_remaining)} left`)),
    facts([["Id", evaluation.id], ["Benchmarks", evaluation.benchmarks.join(", ")], ["Created", time(evaluation.created_at)], ["Finished", time(evaluation.finished_at)]]),
  ];
}

function scoresOf(scores) {
  return section("Scores", null, table("Scores", [
    ["Benchmark", (score) => score.benchmark],
    ["Score", shownScore, "right"],
    ["Items", covered, "right"],
    ["Metric", (score) => score.metric],
    ["Scored by", (score) => `${score.scorer}, judge ${score.judge}, ${score.prompt}`],
  ], scores));
}
