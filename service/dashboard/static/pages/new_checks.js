// What can be looked at before anything is trained: rows as the model sees them, what it costs, which objective suits.

import { get, post } from "../api.js";
import { failure, h, progress, show } from "../dom.js";
import { TERMINAL, reason } from "../format.js";
import { estimate } from "./estimate.js";
import { preflightReport } from "./preflight.js";
import { previewRows } from "./preview.js";

/** body(): the job as it would be submitted; take(objective): puts a verdict into the form. */
export function jobChecks(page, body, take) {
  const out = { estimate: h("div"), preflight: h("div"), preview: h("div") };
  const buttons = {
    estimate: h("button", { type: "button", id: "do-estimate" }, "Estimate time and memory"),
    preflight: h("button", { type: "button", id: "do-preflight" }, "SFT or DFT? Ask the model"),
    preview: h("button", { type: "button", id: "do-preview" }, "Preview the first rows"),
  };
  const element = h("div.page", null,
    h("p.small", null, "None of this trains or costs anything but a moment. The preflight takes one forward pass over a sample of the rows."),
    h("div.actions", null, Object.values(buttons)),
    h("div.page", { "aria-live": "polite" }, Object.values(out)));

  const doing = (name, step) => async () => {
    buttons[name].disabled = true;
    show(out[name], h("p.loading", null, { preview: "Tokenising…", estimate: "Counting…", preflight: "Asking…" }[name]));
    try {
      await step(body(), out[name]);
    } catch (error) {
      if (!page.signal.aborted) show(out[name], failure(error));
    }
    buttons[name].disabled = false;
  };
  buttons.preview.addEventListener("click", doing("preview", async ({ model, training_file, method }, place) => {
    const max_length_tokens = method.supervised.hyperparameters.max_length_tokens;
    const found = await post("/v1/fine_tuning/preview", { model, training_file, num_rows: 3, ...(max_length_tokens && { max_length_tokens }) });
    place.replaceChildren(previewRows(found));
  }));
  buttons.estimate.addEventListener("click", doing("estimate", async (job, place) => {
    place.replaceChildren(estimate(await post("/v1/fine_tuning/estimates", job)));
  }));
  buttons.preflight.addEventListener("click", doing("preflight", async ({ model, training_file }, place) => {
    const made = await post("/v1/fine_tuning/preflights", { model, training_file });
    await page.every(1, async () => {
      const flight = await get(`/v1/fine_tuning/preflights/${made.id}`, {}, page.signal);
      if (!TERMINAL.has(flight.phase)) return show(place, waiting(flight));
      place.replaceChildren(flight.report ? preflightReport(flight.report, take) : failure(flight.error ?? { message: "The preflight was cancelled." }));
      return false;
    });
  }));
  return {
    element,
    enable: (is) => Object.values(buttons).forEach((button) => { button.disabled = !is; }),
    reset: () => Object.values(out).forEach((place) => show(place)),
  };
}

function waiting(flight) {
  const text = flight.queue ? `Waits: ${reason(flight.queue)}` : `${flight.phase.replaceAll("_", " ")}…`;
  return [progress(flight.progress?.percent ?? null, "Preflight"), h("p.small", null, text)];
}
