// The queue: which jobs run and wait, why, and on what machines.

import { get } from "../api.js";
import { empty, h, phase, progress, section, show, table, tile } from "../dom.js";
import { TERMINAL, WAITING, duration, jobName, number, reason, time } from "../format.js";

const PAGE = 50;

export async function render(root, page) {
  page.title("Queue");
  const tiles = h("div.tiles");
  const machines = h("div.machines");
  const rows = h("div");
  const more = h("button", { type: "button", hidden: true }, "Show older jobs");
  let shown = PAGE;
  const filter = h("input", { type: "search", id: "filter", placeholder: "model, name, status…", value: page.params.get("filter") ?? "" });
  let jobs = { data: [], has_more: false };

  const draw = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = jobs.data.filter((job) => words.every((word) => searched(job).includes(word)));
    show(rows, found.length ? jobTable(found) : nothing(words.length > 0));
    more.hidden = !jobs.has_more;
  };
  const load = async () => {
    const [workers, some] = await Promise.all([get("/v1/workers", {}, page.signal), newest(shown, page.signal)]);
    jobs = some;
    show(tiles, ...counts(jobs, workers.data));
    show(machines, ...workers.data.map(machine));
    if (!workers.data.length) show(machines, empty("No worker has reported yet", h("p", null, "Jobs are kept and start as soon as one does.")));
    draw();
  };
  filter.addEventListener("input", () => { page.setParams({ filter: filter.value }); draw(); });
  more.addEventListener("click", async () => { shown += PAGE; more.disabled = true; await page.attempt(load); more.disabled = false; });

  await load();
  root.replaceChildren(
    h("div.head", null, h("h1", null, "Queue"), h("a.button.primary", { href: "#/new" }, "New job")),
    tiles,
    section("Machines", null, machines),
    section("Jobs", null, h("div.filter", null, h("label", { for: "filter" }, "Find"), filter), rows, more),
  );
  page.every(3, load);
}

/** The newest jobs, in pages as the API has them. */
async function newest(count, signal) {
  const data = [];
  let has_more = true;
  for (let after; has_more && data.length < count; after = data.at(-1)?.id) {
    const some = await get("/v1/fine_tuning/jobs", { limit: PAGE, after }, signal);
    data.push(...some.data);
    has_more = some.has_more;
  }
  return { data, has_more };
}

function searched(job) {
  return `${job.id} ${job.model} ${job.suffix ?? ""} ${job.phase} ${job.status} ${job.objective}`.toLowerCase();
}

function counts(jobs, workers) {
  const count = (test) => jobs.data.filter(test).length;
  const plus = jobs.has_more ? "+" : "";
  const alive = workers.filter((worker) => worker.alive);
  return [
    tile("Running", count((job) => !TERMINAL.has(job.phase) && !WAITING.has(job.phase)) + plus),
    tile("Waiting", count((job) => WAITING.has(job.phase)) + plus),
    tile("Finished", count((job) => TERMINAL.has(job.phase)) + plus),
    tile("Workers", `${alive.filter((worker) => worker.busy).length} of ${alive.length} busy`),
  ];
}

function nothing(filtered) {
  if (filtered) return empty("No job matches", h("p", null, "Clear the field above to see all that are loaded."));
  return empty("No jobs yet", h("p", null, "Upload a dataset, look at what the checks find, and train."), h("a.button.primary", { href: "#/new" }, "Make the first job"));
}

function machine(worker) {
  const state = !worker.alive ? "lost" : worker.busy ? "busy" : "idle";
  return h(`div.machine.${state}`, null,
    h("div.row", null, h("strong", null, worker.host), h("span.phase", null, state), h("span.small", null, `${worker.queue} queue`)),
    worker.devices.length ? worker.devices.map(gpu) : h("p.small", null, "No GPU: works on the CPU"),
    worker.job_id?.startsWith("ftjob-") && h("a.small", { href: `#/jobs/${worker.job_id}` }, "its job"),
    !worker.alive && h("p.small", null, `last heard of ${time(worker.last_seen)}`));
}

function gpu(device) {
  const used = device.memory_used_gib / device.memory_total_gib;
  const memory = `${number(device.memory_used_gib)} of ${number(device.memory_total_gib)} GiB`;
  return h("div.gpu", null,
    h("p", null, `GPU ${device.index}: ${device.name}`),
    meter("Memory", used, memory),
    device.utilisation_percent !== null && meter("Utilisation", device.utilisation_percent / 100, `${device.utilisation_percent} %`),
    device.temperature_celsius !== null && h("p.small", null, `${device.temperature_celsius} °C`));
}

function meter(name, share, text) {
  return h("div.meter", null, h("span", null, name), h("meter", { min: "0", max: "1", value: share.toFixed(3), "aria-label": `${name}: ${text}` }), h("span", null, text));
}

function jobTable(jobs) {
  return table("Jobs, newest first", [
    ["Job", (job) => h("a", { href: `#/jobs/${job.id}` }, jobName(job))],
    ["Model", (job) => job.model],
    ["Objective", (job) => job.objective],
    ["Phase", (job) => phase(job.phase)],
    ["Progress", state, "wide"],
    ["Remaining", (job) => (TERMINAL.has(job.phase) ? "–" : duration(job.progress?.seconds_remaining))],
    ["Priority", (job) => job.priority],
    ["Created", (job) => time(job.created_at)],
  ], jobs);
}

function state(job) {
  if (job.queue) return h("span", null, h("strong", null, `No. ${job.queue.position} `), h("span.small", null, reason(job.queue)));
  if (job.error) return h("span.small", null, job.error.message.slice(0, 90));
  if (!job.progress) return "–";
  const { step, total_steps, percent: share } = job.progress;
  return h("span.row", null, progress(share, `Progress of ${job.id}`), h("span.small", null, total_steps ? `${number(step)} / ${number(total_steps)}` : number(step)));
}

