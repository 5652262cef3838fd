// What a job would take: tokens, steps, memory against the devices there, time. Shows whatever figures the answer has.

import { facts, h } from "../dom.js";
import { number } from "../format.js";

export function estimate(answer) {
  const { object: _, ...figures } = answer;
  return h("div.page", null, h("h3", null, "Estimate"), ...parts(figures));
}

function parts(value) {
  const entries = Object.entries(value);
  const plain = entries.filter(([, each]) => !isNested(each)).map(([name, each]) => [title(name), text(each)]);
  const nested = entries.filter(([, each]) => isNested(each));
  return [facts(plain), ...nested.map(([name, each]) => h("div", null, h("h3", null, title(name)), ...parts(each)))];
}

function isNested(value) {
  return value !== null && typeof value === "object" && Object.keys(value).length > 0;
}

function title(name) {
  return /^\d+$/.test(name) ? `No. ${Number(name) + 1}` : name.replaceAll("_", " ");
}

function text(value) {
  if (typeof value === "number") return number(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return value === null ? null : typeof value === "object" ? "none" : String(value);
}
