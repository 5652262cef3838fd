// Where a job was and is, from its events: a stretch per phase with when it began and how long it took.

import { h } from "../dom.js";
import { TERMINAL, duration, time } from "../format.js";

/** The list of phases of all attempts. */
export function timeline(job, events) {
  const stages = [{ name: "created", at: job.created_at }];
  for (const event of events) {
    if (event.data?.phase) stages.push({ name: event.data.phase, at: event.created_at });
    else if (/^Attempt \d+ starts/.test(event.message)) stages.push({ name: "starting", at: event.created_at });
    else if (event.level === "warn" && /^Attempt \d+ was/.test(event.message)) stages.push({ name: "recovering", at: event.created_at });
  }
  if (stages.at(-1).name !== job.phase) stages.push({ name: job.phase, at: job.finished_at ?? stages.at(-1).at });
  return h("ol.timeline", { "aria-label": "Phases so far" }, joined(stages).map((stage, index, all) => shown(stage, all[index + 1], job)));
}

/** Checkpointing is a moment within running; many of them would hide the rest. */
function joined(stages) {
  const kept = [];
  for (const stage of stages) {
    const name = stage.name === "checkpointing" ? "running" : stage.name;
    if (kept.at(-1)?.name !== name) kept.push({ ...stage, name });
  }
  return kept;
}

function shown(stage, next, job) {
  const now = !next && !TERMINAL.has(job.phase);
  const kind = ["failed", "cancelled", "recovering"].includes(stage.name) ? "bad" : now ? "now" : "past";
  const took = next ? `, ${duration(next.at - stage.at)}` : "";
  return h(`li.${kind}`, now ? { "aria-current": "step" } : null, stage.name.replaceAll("_", " "), h("span.small", null, time(stage.at) + took));
}
