// What competes in a comparison: several objectives, at one or several learning rates, batch sizes and seeds.

import { h, show } from "../dom.js";
import { field, typedList } from "../form.js";
import { severalObjectives } from "./objectives.js";

const AXES = [["learning_rate", "Learning rates", "lr"], ["batch_size", "Batch sizes", "batch"], ["seed", "Seeds", "seed"]];

export function armsPart(objectives) {
  const several = severalObjectives(objectives, ["nll", "dft"]);
  const axes = AXES.map(([key, title, part]) => ({ key, title, part, input: h("input", { id: `arms-${key}`, placeholder: "as below" }) }));
  const name = h("input", { id: "comparison-name", maxlength: "255", placeholder: "named after its arms" });
  const count = h("p.small", { role: "status" });

  const arms = () => {
    let all = several.chosen().map(({ objective, [objective]: options }) => ({ name: objective, objective, ...(options && { options }) }));
    for (const { key, part, input } of axes) {
      const values = typedList(input.value);
      if (values.length) all = all.flatMap((arm) => values.map((value) => ({ ...arm, name: `${arm.name}-${part}${value}`, [key]: value })));
    }
    return all;
  };
  const element = h("div.page", null, several.element,
    h("div.fields", null, axes.map(({ title, input }) => field(title, input)), field("Name of the comparison", name)),
    h("p.help", null, "Several learning rates, batch sizes or seeds, with spaces between them: every combination is an arm."), count);
  const draw = () => {
    const names = arms().map((arm) => arm.name);
    show(count, `${names.length === 1 ? "1 arm" : `${names.length} arms`}: ${names.slice(0, 8).join(", ") || "choose objectives"}${names.length > 8 ? "…" : ""}`);
  };
  element.addEventListener("input", draw);
  draw();
  return { element, first: () => several.chosen()[0] ?? {}, body: (job) => ({ job, arms: arms(), ...(name.value.trim() && { name: name.value.trim() }) }) };
}
