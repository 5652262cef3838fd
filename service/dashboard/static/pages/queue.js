// The queue: which jobs run, which wait and why, which have ended, and what the machines do.

import { get } from "../api.js";
import { empty, h, phase, progress, section, show, table, tile } from "../dom.js";
import { duration, jobName, number, place, reason, time } from "../format.js";

const PAGE = 25;
const JOBS = "/v1/fine_tuning/jobs";

export async function render(root, page) {
  page.title("Queue");
  const tiles = h("div.tiles");
  const machines = h("div.machines");
  const filter = h("input", { type: "search", id: "filter", placeholder: "name, model, phase…", value: page.params.get("filter") ?? "" });
  const lists = [
    jobList("Running", page, { status: "running" }, RUNNING),
    jobList("Waiting", page, { status: "queued", order: "asc" }, WAITING),
    jobList("All jobs", page, {}, ENDED),
  ];
  const nothing = h("section.card", { hidden: true }, empty("No jobs yet", h("p", null, "Upload a dataset, look at what the checks find, and train."), h("a.button.primary", { href: "#/new" }, "Make the first job")));

  const draw = () => {
    for (const list of lists) list.draw(filter.value.toLowerCase().split(/\s+/).filter(Boolean));
    nothing.hidden = lists.some((list) => list.jobs.length);
  };
  const load = async () => {
    const [workers] = await Promise.all([get("/v1/workers", {}, page.signal), ...lists.map((list) => list.load())]);
    show(tiles, ...lists.slice(0, 2).map((list) => tile(list.title, number(list.jobs.length) + (list.more ? "+" : ""))), busy(workers.data));
    show(machines, ...(workers.data.length ? workers.data.map(machine) : [empty("No worker has reported yet", h("p", null, "Jobs are kept and start as soon as one does."))]));
    draw();
  };
  filter.addEventListener("input", () => { page.setParams({ filter: filter.value }); draw(); });

  await load();
  root.replaceChildren(
    h("div.head", null, h("h1", null, "Queue"), h("div.filter", null, h("label", { for: "filter" }, "Find"), filter), h("a.button.primary", { href: "#/new" }, "New job")),
    tiles, section("Machines", null, machines), nothing, ...lists.map((list) => list.element),
  );
  page.every(3, load);
}

/** A list of jobs by status, which hides while it is empty and grows on request. */
function jobList(title, page, query, columns) {
  const rows = h("div");
  const more = h("button", { type: "button" }, "Show more");
  const element = section(title, { hidden: true }, rows, more);
  let wanted = PAGE;
  const list = { title, element, jobs: [], more: false };
  list.load = async () => {
    list.jobs = [];
    list.more = true;
    for (let after; list.more && list.jobs.length < wanted; after = list.jobs.at(-1)?.id) {
      const some = await get(JOBS, { ...query, limit: PAGE, after }, page.signal);
      list.jobs = [...list.jobs, ...some.data];
      list.more = some.has_more;
    }
    if (query.status === "queued") list.jobs.sort((a, b) => (a.queue?.position ?? Infinity) - (b.queue?.position ?? Infinity));
  };
  list.draw = (words) => {
    list.words = words;
    const found = list.jobs.filter((job) => words.every((word) => searched(job).includes(word)));
    element.hidden = !list.jobs.length;
    more.hidden = !list.more;
    show(rows, found.length ? table(title, columns, found) : h("p.small", null, "None of those that are loaded matches."));
  };
  more.addEventListener("click", () => { wanted += PAGE; page.attempt(async () => { await list.load(); list.draw(list.words); }); });
  return list;
}

function searched(job) {
  return `${job.id} ${job.model} ${job.suffix ?? ""} ${job.phase} ${job.status} ${job.objective} ${job.priority}`.toLowerCase();
}

const NAME = [
  ["Job", (job) => h("a", { href: `#/jobs/${job.id}` }, jobName(job))],
  ["Model", (job) => job.model, "text"],
  ["Objective", (job) => job.objective],
  ["Phase", (job) => phase(job.phase)],
];
const RUNNING = [...NAME, ["Progress", steps, "wide"], ["Remaining", (job) => duration(job.progress?.seconds_remaining)], ["Since", (job) => time(job.started_at)]];
const WAITING = [...NAME, ["Place", (job) => h("strong", null, place(job.queue))], ["Why it waits", (job) => reason(job.queue) || job.phase, "wide"], ["Priority", (job) => job.priority], ["Starts at about", (job) => time(job.queue?.estimated_start)], ["Since", (job) => time(job.created_at)]];
const ENDED = [...NAME, ["Result", result, "wide"], ["Created", (job) => time(job.created_at)], ["Ended", (job) => time(job.finished_at)]];

function steps(job) {
  if (!job.progress) return "–";
  const { step, total_steps, percent, benchmark, items_done, items_total } = job.progress;
  const text = benchmark ? `${benchmark} ${number(items_done)} / ${number(items_total)}` : total_steps ? `${number(step)} / ${number(total_steps)}` : number(step);
  return h("span.row", null, progress(percent, `Progress of ${job.id}`), h("span.small", null, text));
}

function result(job) {
  if (job.error) return h("span.small", null, job.error.message.slice(0, 120));
  if (!job.result) return "–";
  const scores = job.scores.filter((score) => score.model_role === "tuned").map((score) => `${score.benchmark} ${(100 * score.value).toFixed(1)} %`);
  return h("span", null, `NLL ${number(job.result.first_nll)} → ${number(job.result.last_nll)} `, h("span.small", null, scores.join(", ")));
}

function busy(workers) {
  const alive = workers.filter((worker) => worker.alive);
  return tile("Workers", `${alive.filter((worker) => worker.busy).length} of ${alive.length} busy`);
}

function machine(worker) {
  const state = !worker.alive ? "lost" : worker.busy ? "busy" : "idle";
  return h(`div.machine.${state}`, null,
    h("div.row", null, h("strong", null, worker.host), h("span.phase", null, state), h("span.small", null, `${worker.queue} queue`)),
    worker.devices.length ? worker.devices.map(gpu) : h("p.small", null, "No GPU: works on the CPU"),
    worker.job_id?.startsWith("ftjob-") && h("p", null, h("a", { href: `#/jobs/${worker.job_id}` }, "The job it runs")),
    !worker.alive && h("p.small", null, `last heard of ${time(worker.last_seen)}`));
}

function gpu(device) {
  const memory = `${number(device.memory_used_gib)} of ${number(device.memory_total_gib)} GiB`;
  return h("div.gpu", null,
    h("p", null, `GPU ${device.index}: ${device.name}`),
    meter("Memory", device.memory_used_gib / device.memory_total_gib, memory),
    device.utilisation_percent !== null && meter("Utilisation", device.utilisation_percent / 100, `${device.utilisation_percent} %`),
    device.temperature_celsius !== null && h("p.small", null, `${device.temperature_celsius} °C`));
}

function meter(name, share, text) {
  return h("div.meter", null, h("span", null, name), h("meter", { min: "0", max: "1", value: share.toFixed(3), "aria-label": `${name}: ${text}` }), h("span", null, text));
}
