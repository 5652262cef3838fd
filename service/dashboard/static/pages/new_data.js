// The training data of a new job: choose a file that is there, or upload one and read what its validation found.

import { get, upload } from "../api.js";
import { failure, h, progress, show } from "../dom.js";
import { field } from "../form.js";
import { bytes, number, reason, time } from "../format.js";
import { validationReport } from "./report.js";

/** first and heldOut: ids of the files to begin with; chosen(file or null) is called when the training file changes. */
export function dataPart(page, { first, heldOut, model }, chosen) {
  const select = h("select", { id: "file" });
  const other = h("select", { id: "held-out" });
  const input = h("input", { type: "file", id: "upload", accept: ".jsonl,.json,.gz,.tgz,.tar,.zip" });
  const invalid = h("input", { type: "number", id: "max-invalid", min: "0", max: "99", step: "any", value: "0" });
  const told = h("div", { "aria-live": "polite" });
  const report = h("div");
  const drop = h("div.drop", null,
    field("Upload a dataset", input, "A .jsonl, or a .tar.gz or .zip of one and its pictures, in the form of OpenAI chat, ShareGPT or WeThink. You can drop it here."),
    field("Percent of rows that may be invalid", invalid, "They are left out and counted. 0: one invalid row refuses the file."));
  const element = h("div.page", null, field("Use a file that is there", select), drop, told, report,
    field("Held-out file", other, "Its NLL is measured before, during and after the training."));
  let watched = 0;

  const list = async (id) => {
    const files = (await get("/v1/files", { purpose: "fine-tune", limit: 100 }, page.signal)).data;
    show(select, h("option", { value: "" }, files.length ? "Choose…" : "None yet"), files.map((file) => h("option", { value: file.id }, `${file.filename}, ${bytes(file.bytes)}, ${time(file.created_at)}${file.status === "processed" ? "" : ` (${file.status})`}`)));
    select.value = id ?? "";
    const before = other.value || heldOut;
    show(other, h("option", { value: "" }, "None"), files.filter((file) => file.status === "processed").map((file) => h("option", { value: file.id }, `${file.filename}, ${time(file.created_at)}`)));
    other.value = before ?? "";
  };
  /** Follow a file until it is validated, then show what was found. */
  const watch = async (id) => {
    const mine = ++watched;
    show(report);
    chosen(null);
    if (!id) return show(told);
    await page.every(0.7, async () => {
      const file = await get(`/v1/files/${encodeURIComponent(id)}`, {}, page.signal);
      if (mine !== watched) return false;
      if (file.status === "uploaded") {
        show(told, waiting(file));
        return true;
      }
      show(told);
      report.replaceChildren(validationReport(file, page));
      await list(id);
      chosen(file);
      return false;
    });
  };
  const send = async (file) => {
    const mine = ++watched;
    const bar = h("progress.broad", { max: "1", value: "0", "aria-label": "Upload" });
    const share = h("p.small", null, `${file.name}, ${bytes(file.size)}`);
    show(report);
    told.replaceChildren(bar, share);
    chosen(null);
    try {
      const fields = { purpose: "fine-tune", ...(Number(invalid.value) && { max_invalid_fraction: String(invalid.value / 100) }), ...(model() && { model: model() }) };
      const made = await upload("/v1/files", fields, file, (done) => {
        bar.value = done;
        share.textContent = done < 1 ? `${file.name}: ${(100 * done).toFixed(0)} % of ${bytes(file.size)}` : `${file.name}: arrived, being kept…`;
      }, page.signal);
      if (mine === watched) await Promise.all([list(made.id), watch(made.id)]);
    } catch (error) {
      if (!page.signal.aborted) show(told, failure(error, { title: "The file was not taken. ", retry: () => send(file) }));
    } finally {
      input.value = "";
    }
  };
  select.addEventListener("change", () => watch(select.value));
  input.addEventListener("change", () => input.files[0] && send(input.files[0]));
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
    });
  }
  const start = async () => {
    await list(first);
    if (first) watch(first);
  };
  return { element, start, heldOut: () => other.value };
}

function waiting(file) {
  const state = file.validation;
  const done = state?.progress;
  const text = state?.queue ? `Waits to be checked: ${reason(state.queue)}` : done?.items_done ? `Checking: ${number(done.items_done)} of ${number(done.items_total)} rows` : "Checking every row and picture…";
  return [progress(done?.percent ?? null, "Validation"), h("p.small", null, text)];
}
