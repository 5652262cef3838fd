// Numbers, times and names as people read them. Knows no element.

/** Three significant digits or so; "–" for what is not known. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.ceil(Math.log10(size + 1))) });
}

/** 0.9 as 90.0 %. */
export function percent(value, digits = 1) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`;
}

/** A number beside an axis, as exactly as neighbours that are a step apart need to differ. */
export function numberTick(value, step) {
  return number(value, Math.max(3, 2 + Math.ceil(Math.log10(1 + Math.abs(value) / step))));
}

/** The same for shares: with as few decimals as the step itself needs. */
export function percentTick(value, step) {
  const decimals = [0, 1, 2, 3, 4].find((count) => Math.abs(Number((100 * step).toFixed(count)) - 100 * step) < 1e-9);
  return percent(value, decimals ?? 5);
}

/** 94 as 1 min 34 s. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

/** Seconds since the epoch as a time of this day, or a date. */
export function time(seconds) {
  if (!seconds) return "–";
  const date = new Date(seconds * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const clock = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return today ? clock : `${date.toLocaleDateString("en-CA")} ${clock.slice(0, 5)}`;
}

/** 1536 as 1.5 KiB. */
export function bytes(value) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) [size, unit] = [size / 1024, unit + 1];
  return `${unit ? size.toFixed(1) : size} ${units[unit]}`;
}

/** The end of an id, which tells it from others. */
export function short(id) {
  return id.length > 16 ? `…${id.slice(-8)}` : id;
}

/** How a user would call a job. */
export function jobName(job) {
  return job.suffix ? `${job.suffix} ${short(job.id)}` : `${job.model} ${short(job.id)}`;
}

export const TERMINAL = new Set(["succeeded", "failed", "cancelled"]);
export const WAITING = new Set(["queued", "recovering", "paused"]);

const REASONS = {
  not_started: "waits for its start",
  paused: "paused",
  project_cap: "as many of the project's jobs run as may",
  key_cap: "as many of the key's jobs run as may",
  no_worker_alive: "no worker is alive",
  waiting_for_gpu: "waits for a GPU",
  waiting_for_worker: "waits for a worker",
};

/** A job's place in the queue; one that is paused or held back has none. */
export function place(queue) {
  return queue?.position ? `No. ${number(queue.position)}` : "–";
}

/** Why a job waits, in words. */
export function reason(queue) {
  if (!queue) return "";
  const why = queue.blocked_reason ? (REASONS[queue.blocked_reason] ?? queue.blocked_reason.replaceAll("_", " ")) : "next";
  return queue.ahead === null ? why : `${number(queue.ahead)} ahead, ${why}`;
}
