// What a job would take: rows that fit, tokens, steps, memory against the devices there, time, and other pixel limits.

import { facts, h, table, tile } from "../dom.js";
import { duration, number } from "../format.js";

export function estimate(answer) {
  const { rows, tokens, steps, memory, devices, time, queue, pixels, notes } = answer;
  return h("div.page", null, h("h3", null, "Estimate"),
    h("div.tiles", null,
      tile("Steps", number(steps.total), `${number(steps.per_epoch)} an epoch`),
      tile("Tokens", number(steps.input_tokens), tokens && `${number(tokens.text)} text and ${number(tokens.visual)} visual an epoch`),
      tile("Memory", memory ? `${number(memory.total_gib)} GiB` : "–", memory && `of one device, ${memory.precision}`),
      tile("Time", duration(time.seconds), time.basis),
      tile("Waiting", duration(queue.seconds), `${number(queue.jobs_ahead)} ahead; ${queue.basis}`)),
    tooLong(rows), ...devices.map(fit), ...notes.map((note) => h("p.notice.warn", null, note)),
    memory && memoryParts(memory), pixels.length > 0 && pixelTable(pixels));
}

function tooLong(rows) {
  if (rows.refused) return h("p.notice.bad", null, `${number(rows.refused)} of ${number(rows.total)} rows cannot be taken by this model: ${rows.refused_rows.join("; ")}`);
  if (!rows.too_long) return h("p.notice.good", null, `All ${number(rows.total)} rows fit into ${number(rows.limit_tokens)} tokens.`);
  const then = rows.on_overlong === "drop" ? "they would be left out" : "the job would be refused";
  return h("p.notice.bad", null, `${number(rows.too_long)} of ${number(rows.total)} rows are above ${number(rows.limit_tokens)} tokens: ${then}.`);
}

function fit(device) {
  if (device.fits === null) return h("p.small", null, `${number(device.count)} × ${device.name}: does not tell its memory`);
  return h(`p.notice.${device.fits ? "good" : "bad"}`, null, `${device.fits ? "Fits" : "Does not fit"} on ${number(device.count)} × ${device.name} with ${number(device.memory_total_gib)} GiB.`);
}

function memoryParts(memory) {
  const parts = ["weights", "gradients", "optimizer", "activations", "vision", "head", "fixed"];
  return h("details", null, h("summary", null, "Memory in parts"),
    facts([...parts.map((name) => [name, `${number(memory[`${name}_gib`])} GiB`]), ["parameters", number(memory.parameters)], ["trained of them", number(memory.trainable_parameters)], ["largest micro-batch", `${number(memory.largest_micro_batch_tokens)} tokens`]]),
    h("p.help", null, memory.basis));
}

function pixelTable(pixels) {
  return h("details", null, h("summary", null, "Other pixel limits"), table("Pixel limits against tokens", [
    ["Pixels of a picture", (row) => `${number(row.min_pixels)} to ${number(row.max_pixels)}${row.is_asked ? " (asked)" : ""}`],
    ["Visual tokens", (row) => row.problem ?? number(row.visual_tokens), "right"],
    ["Of a picture", (row) => number(row.mean_tokens_per_image), "right"],
    ["Longest row", (row) => number(row.longest_row_tokens), "right"],
    ["Too long", (row) => number(row.too_long), "right"],
  ], pixels));
}
