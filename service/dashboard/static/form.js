// Parts of forms: fields with their labels and help, choices, boxes to tick. Knows no page.

import { h } from "./dom.js";

/** An input under its label; help is read out with it. */
export function field(title, input, help) {
  if (help) input.setAttribute("aria-describedby", `${input.id}-help`);
  return h("div.field", null, h("label", { for: input.id }, title), input, help && h("p.help", { id: `${input.id}-help` }, help));
}

/** A list to choose one of: options are values, or [value, title]; one that is chosen is there even if it is not listed. */
export function choice(id, options, chosen) {
  const pairs = options.map((each) => (Array.isArray(each) ? each : [each, each]));
  if (chosen && !pairs.some(([value]) => value === chosen)) pairs.push([chosen, chosen]);
  const select = h("select", { id }, pairs.map(([value, title]) => h("option", { value }, title)));
  select.value = chosen ?? pairs[0]?.[0] ?? "";
  return select;
}

/** A box to tick, before its title. */
export function ticked(box, title = box.value) {
  return h("label", { for: box.id }, box, title);
}

/** Boxes to tick several of; chosen() tells which. */
export function boxes(legend, prefix, names, before = []) {
  const inputs = names.map((name) => h("input", { type: "checkbox", id: `${prefix}-${name}`, value: name, checked: before.includes(name) }));
  const element = h("fieldset", null, h("legend", null, legend), h("div.choice", null, inputs.map((box) => ticked(box))));
  return { element, chosen: () => inputs.filter((box) => box.checked).map((box) => box.value) };
}

/** A number where it is one; else as typed, for the service to refuse with its reason. */
export function typed(text) {
  return Number.isFinite(Number(text)) ? Number(text) : text.trim();
}

/** The numbers of a list that is typed with spaces or commas between them. */
export function typedList(text) {
  return text.split(/[\s,]+/).filter(Boolean).map(typed);
}
