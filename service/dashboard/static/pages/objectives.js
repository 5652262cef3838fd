// Choosing objectives, with the options of each. Which there are, and within which limits, is what the API lists.

import { get } from "../api.js";
import { h } from "../dom.js";
import { choice, field, ticked, typed } from "../form.js";

export async function allObjectives(page) {
  return (await get("/v1/fine_tuning/objectives", {}, page.signal)).data;
}

/** One objective: chosen() gives its part of method.supervised. given: that of a job whose settings are used again. */
export function oneObjective(objectives, given = {}) {
  const select = choice("objective", objectives.map((each) => [each.id, `${each.id}: ${each.description}`]), given.objective ?? "dft");
  const place = h("div.fields");
  let options;
  const draw = () => {
    options = optionsOf(objectives.find((each) => each.id === select.value), "o", given[select.value]);
    place.replaceChildren(...options.fields);  // not shown: values() reads these very inputs
  };
  select.addEventListener("change", draw);
  draw();
  const choose = ({ name, ...values }) => {
    given = { ...given, [name]: values };
    select.value = name;
    draw();
  };
  return { element: h("div.page", null, field("Objective", select), place), chosen: () => part(select.value, options), choose };
}

/** Several objectives that compete: chosen() gives such parts in the order of the list. */
export function severalObjectives(objectives, first) {
  const all = objectives.map((objective) => {
    const box = h("input", { type: "checkbox", id: `arm-${objective.id}`, value: objective.id, checked: first.includes(objective.id) });
    const options = optionsOf(objective, "arm");
    const more = h("div.fields", { hidden: !box.checked }, options.fields);
    box.addEventListener("change", () => { more.hidden = !box.checked; });
    return { box, options, element: h("div.arm", null, ticked(box, h("span", null, h("strong", null, objective.id), h("span.small", null, ` ${objective.description}`))), more) };
  });
  const chosen = () => all.filter(({ box }) => box.checked).map(({ box, options }) => part(box.value, options));
  return { element: h("fieldset", null, h("legend", null, "Objectives that compete"), h("div.arms", null, all.map(({ element }) => element))), chosen };
}

function part(objective, options) {
  const values = options.values();
  return { objective, ...(Object.keys(values).length && { [objective]: values }) };
}

function optionsOf({ id, options }, prefix, given = {}) {
  const inputs = Object.entries(options).map(([name, schema]) => [name, schema, inputOf(`${prefix}-${id}-${name}`, schema, given[name])]);
  return {
    fields: inputs.map(([name, schema, input]) => field(titleOf(name), input, `${schema.description} ${limits(schema)}`)),
    values: () => Object.fromEntries(inputs.filter(([, , input]) => input.value.trim()).map(([name, , input]) => [name, typed(input.value)])),
  };
}

function inputOf(id, schema, given) {
  if (schema.enum) return choice(id, schema.enum, given ?? schema.default);
  return h("input", { id, inputmode: "decimal", placeholder: schema.default ?? "none", value: given ?? "" });
}

function titleOf(name) {
  return name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
}

function limits({ minimum, exclusiveMinimum, maximum }) {
  if (maximum === undefined) return "";
  return minimum === undefined ? `Above ${exclusiveMinimum}, at most ${maximum}.` : `${minimum} to ${maximum}.`;
}
