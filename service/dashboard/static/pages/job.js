// One job: where it is, how it goes, what it left behind, and what can be done with it.

import { call, events, get, post } from "../api.js";
import { failure, facts, h, phase, section, show, tile } from "../dom.js";
import { TERMINAL, bytes, duration, jobName, number, place, reason, short, time } from "../format.js";
import { jobCharts } from "./job_charts.js";
import { jobOutputs } from "./job_outputs.js";
import { jobReport } from "./job_report.js";
import { jobSamples } from "./job_samples.js";
import { timeline } from "./job_timeline.js";

/** What may be asked of a job in which phase. */
const ACTIONS = [
  ["start", "Start", (job) => job.phase === "created", "primary"],
  ["pause", "Pause", (job) => ["queued", "recovering", "starting", "loading_model", "running", "checkpointing"].includes(job.phase), ""],
  ["resume", "Resume", (job) => job.phase === "paused", "primary"],
  ["cancel", "Cancel", (job) => !TERMINAL.has(job.phase) && job.phase !== "cancelling", "danger"],
];

export async function render(root, page, id) {
  page.title(short(id));
  const path = `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  let job = await get(path, {}, page.signal);
  const parts = { head: h("div.head"), trouble: h("div"), state: h("div"), line: h("div"), about: h("div") };
  const charts = jobCharts(path, page);
  const samples = jobSamples(path, page);
  const outputs = jobOutputs(path, page);
  const report = jobReport(path, page);
  const recent = { events: [] };

  const act = async (name) => {
    if (name === "cancel" && !confirm("Cancel this job? What it trained so far is kept in its checkpoints, no model is made.")) return;
    await change(() => post(`${path}/${name}`));
  };
  const change = async (step) => {
    try {
      job = await step();
      show(parts.trouble);
      draw();
    } catch (error) {
      show(parts.trouble, failure(error));
    }
  };
  const draw = () => {
    page.title(`${job.phase} ${jobName(job)}`);
    show(parts.head, h("h1", null, jobName(job), " ", phase(job.phase)), actions(job, act, (priority) => change(() => call("PATCH", path, { priority }))));
    show(parts.state, state(job), ...tiles(job));
    show(parts.line, timeline(job, recent.events));
    show(parts.about, about(job));
  };
  draw();
  root.replaceChildren(parts.head, parts.trouble, parts.state, section("Phases", null, parts.line), report.element, charts.element, samples.element, outputs.element, section("Settings", null, parts.about));
  const refresh = async () => { job = await get(path, {}, page.signal); draw(); };
  page.every(2, async () => {
    await refresh();
    await Promise.all([charts.load(job), samples.load(job), outputs.load(job), report.load(job)]);
    return !TERMINAL.has(job.phase);
  });
  follow(`${path}/events/stream?type=message`, page, (event) => {
    recent.events.push(event);
    outputs.addEvent(event);
    if (event.data?.phase) refresh().catch(() => {});  // a moment earlier than the next look
    else later(draw);
  });
}

let waiting = null;
function later(draw) {
  clearTimeout(waiting);
  waiting = setTimeout(draw, 200);
}

/** Events from the first to the last; where the stream breaks off it goes on from there. */
function follow(path, page, told) {
  let seq = 0;
  page.every(2, async () => {
    for await (const event of events(`${path}&after_seq=${seq}`, page.signal)) {
      if (event.name === "done") return false;
      seq = event.data.seq;
      told(event.data);
    }
  });
}

function actions(job, act, rank) {
  const buttons = ACTIONS.filter(([, , may]) => may(job)).map(([name, title, , kind]) =>
    h(kind ? `button.${kind}` : "button", { type: "button", onclick: () => act(name), "data-action": name }, title));
  const levels = h("select", { id: "priority", onchange: () => rank(levels.value) }, ["low", "normal", "high"].map((level) => h("option", { value: level, selected: level === job.priority }, level)));
  const priority = job.queue && h("span.row", null, h("label", { for: "priority" }, "Priority"), levels);
  return h("div.actions", null, priority, buttons, h("a.button", { href: `#/new?from=${job.id}` }, "Use its settings again"));
}

function state(job) {
  if (job.error) {
    return h("div.notice.bad", { role: "alert" }, h("p", null, h("strong", null, `${job.error.code}: `), job.error.message), job.error.hint && h("p", null, job.error.hint));
  }
  if (job.queue) return h("p.notice.warn", null, job.queue.position && h("strong", null, `${place(job.queue)} in the queue: `), reason(job.queue), job.queue.estimated_start ? `. Likely to start at ${time(job.queue.estimated_start)}` : "");
  if (TERMINAL.has(job.phase) || !job.progress) return null;
  const p = job.progress;
  const what = p.benchmark ? `${p.benchmark}: ${number(p.items_done)} of ${number(p.items_total)} items` : `step ${number(p.step)} of ${number(p.total_steps)}`;
  const left = p.seconds_remaining === null ? "" : `, ${duration(p.seconds_remaining)} left, done at about ${time(Date.now() / 1000 + p.seconds_remaining)}`;
  return h("div", null, h("progress.broad", { max: "100", value: p.percent === null ? undefined : String(p.percent), "aria-label": "Progress of the job" }), h("p.small", null, what + left));
}

function tiles(job) {
  const took = (job.finished_at ?? Date.now() / 1000) - (job.started_at ?? 0);
  return [h("div.tiles", null,
    tile("Objective", job.objective, "raw NLL is shown for every objective"),
    job.result && tile("Raw NLL", `${number(job.result.first_nll)} → ${number(job.result.last_nll)}`, "first and last step"),
    job.result && job.result.valid_nll_after !== null && tile("Held-out NLL", `${number(job.result.valid_nll_before)} → ${number(job.result.valid_nll_after)}`, "before and after"),
    tile("Trained tokens", number(job.trained_tokens)),
    !job.result && tile("Throughput", job.progress?.tokens_per_second ? `${number(job.progress.tokens_per_second)} tokens/s` : "–"),
    tile("Attempt", number(job.attempt), job.started_at ? `${TERMINAL.has(job.phase) ? "took" : "for"} ${duration(took)}` : "not started"),
    job.fine_tuned_model && tile("Model", job.fine_tuned_model, "as GET /v1/models lists it"))];
}

function about(job) {
  const config = JSON.stringify(job.resolved_config, null, 2);
  return [
    facts([
      ["Id", job.id], ["Model", job.model], ["Created", time(job.created_at)], ["Started", time(job.started_at)], ["Finished", time(job.finished_at)],
      ["Priority", job.priority], ["Seed", job.seed], ["Training file", job.training_file], ["Held-out file", job.validation_file],
      ["Data fingerprint", job.data_fingerprint && h("code", null, job.data_fingerprint.slice(0, 16))], ["Device", job.result?.device], ["Precision", job.result?.precision],
      ["Metadata", Object.keys(job.metadata ?? {}).length ? JSON.stringify(job.metadata) : null],
    ]),
    h("h3", null, "All that the trainer was told"),
    h("details", null, h("summary", null, `Resolved configuration (${bytes(config.length)})`), h("pre", { tabindex: "0", "aria-label": "Resolved configuration" }, config)),
  ];
}
