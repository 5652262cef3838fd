// Keys and projects: which key this tab uses, what the project uses of its quotas, and, for administrators, all keys.

import { call, get, key, optional, post } from "../api.js";
import { empty, h, phase, section, show, table } from "../dom.js";
import { choice, field, ticked } from "../form.js";
import { bytes, number, time } from "../format.js";

export async function render(root, page) {
  page.title("Keys");
  const administered = h("div");
  root.replaceChildren(h("div.head", null, h("h1", null, "Keys")), section("This browser tab", null, ownKey()));
  const usage = await optional("/v1/usage", {}, page.signal);
  if (usage) root.append(section(`Usage of the project ${usage.project}`, null, usageTable(usage)));
  root.append(administered);
  await admin(administered, page);
}

function ownKey() {
  const input = h("input", { id: "own-key", type: "password", autocomplete: "current-password", placeholder: key.get() ? "a key is in use" : "none" });
  const use = (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    dispatchEvent(new HashChangeEvent("hashchange"));
  };
  const forget = () => { key.set(null); dispatchEvent(new HashChangeEvent("hashchange")); };
  return h("form", { onsubmit: use },
    h("label", { for: "own-key" }, "API key"),
    h("div.row", null, input, h("button.primary", { type: "submit" }, "Use"), key.get() && h("button", { type: "button", onclick: forget }, "Forget it")),
    h("p.help", null, "Kept in this tab only, until you close it. A service on this machine without keys needs none."));
}

function usageTable(usage) {
  const rows = [
    ["Files", usage.files, number], ["Stored", usage.bytes, bytes], ["Jobs that have not ended", usage.unfinished_jobs, number],
    ["Jobs that run", usage.running_jobs, number], [`GPU minutes in ${usage.month}`, usage.gpu_minutes, number],
  ];
  return table("Usage", [
    ["Of", ([name]) => name],
    ["Used", ([, quota, format]) => format(quota.used), "right"],
    ["Reserved", ([, quota, format]) => (quota.reserved ? format(quota.reserved) : "–"), "right"],
    ["Limit", ([, quota, format]) => (quota.limit === null ? "none" : format(quota.limit)), "right"],
  ], rows);
}

/** Only keys with the scope admin may see these; others are told so. */
async function admin(place, page) {
  let lists;
  try {
    lists = await Promise.all([optional("/v1/api_keys", {}, page.signal), optional("/v1/projects", {}, page.signal)]);
  } catch (error) {
    if (error.status !== 403) throw error;
    return show(place, section("Keys of this service", null, h("p.notice", null, error.message)));
  }
  const [keys, projects] = lists;
  if (!keys) return show(place, section("Keys of this service", null, h("p", null, "This service manages keys with ", h("code", null, "vlm-dft keys"), " only.")));
  const trouble = h("div");
  const made = h("div", { "aria-live": "polite" });
  const again = (step) => page.ask(trouble, async () => {
    const answer = await step();
    if (answer.key) show(made, newKey(answer));
    await admin(place, page);
    if (answer.key) place.querySelector("section").append(made);
  });
  place.replaceChildren(section("Keys of this service", null, keys.data.length ? keyTable(keys.data, again) : empty("No keys yet", h("p", null, "Without any, this service answers its own machine only.")), keyForm(projects?.data ?? [], again), trouble));
}

function keyTable(keys, again) {
  const revoke = (each) => confirm(`Revoke ${each.name}? Whoever uses it is refused from now on.`) && again(() => call("DELETE", `/v1/api_keys/${each.id}`));
  return table("API keys", [
    ["Name", (each) => each.name, "text"], ["Begins with", (each) => h("code", null, each.prefix)], ["Project", (each) => each.project], ["May", (each) => each.scopes.join(", ")],
    ["State", (each) => phase(each.status)], ["Last used", (each) => time(each.last_used_at)], ["Expires", (each) => (each.expires_at ? time(each.expires_at) : "never")],
    ["", (each) => each.status === "active" && h("div.actions", null,
      h("button", { type: "button", onclick: () => again(() => post(`/v1/api_keys/${each.id}/rotate`, {})), "aria-label": `Rotate ${each.name}` }, "Rotate"),
      h("button.danger", { type: "button", onclick: () => revoke(each), "aria-label": `Revoke ${each.name}` }, "Revoke"))],
  ], keys);
}

function keyForm(projects, again) {
  const name = h("input", { id: "key-name", required: true, maxlength: "255" });
  const project = choice("key-project", projects.map((each) => each.id));
  const days = h("input", { id: "key-days", type: "number", min: "1", max: "3650", placeholder: "never" });
  const administrates = h("input", { id: "key-admin", type: "checkbox" });
  const submit = (event) => {
    event.preventDefault();
    again(() => post("/v1/api_keys", {
      project: project.value, name: name.value,
      ...(days.value && { expires_in_seconds: Number(days.value) * 86400 }),
      ...(administrates.checked && { scopes: ["read", "write", "admin"] }),
    }));
  };
  return h("form.page", { onsubmit: submit }, h("h3", null, "Make a key"),
    h("div.fields", null, field("What it is for", name), field("Project", project), field("Expires after days", days),
      h("div.choice", null, ticked(administrates, "may administrate keys and projects"))),
    h("p", null, h("button.primary", { type: "submit" }, "Make it")));
}

function newKey(made) {
  return h("div.notice.good", { role: "alert" }, h("p", null, h("strong", null, `The key ${made.name}. `), "It is shown this once:"), h("code", null, made.key));
}
