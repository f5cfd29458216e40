/** Messages of the form, and questions that wait for an answer. */

import {$, make, namedFields, sentence} from "./dom.js";

/** Show what is wrong, and mark the fields that the message names. */
export function complain(message) {
  $("error").textContent = message ? sentence(message) : "";
  $("error").hidden = !message;
  if (message) $("notice").hidden = true;
  for (const field of namedFields()) {
    const named = message && new RegExp(`(^|\\W)${field.name}(\\W|$)`).test(message.split(";")[0]);
    if (named) field.setAttribute("aria-invalid", "true"); else field.removeAttribute("aria-invalid");
    if (named && field.closest("details")) field.closest("details").open = true;
  }
}

/** Say something; with `action` a button does it. */
export function notice(message, action = "", does = null) {
  $("notice").replaceChildren(message);
  if (does) {
    const button = make("button", {type: "button", className: "chip"}, action);
    button.addEventListener("click", () => { notice(""); does(); });
    $("notice").append(" ", button);
  }
  $("notice").hidden = !message;
}

/** Ask a question in a dialog. Resolves to whether `yes` was pressed; Escape means no. */
export function confirmed(title, text, yes, {no = "Cancel", danger = false} = {}) {
  const dialog = $("question");
  $("question-title").textContent = title;
  $("question-text").textContent = text;
  $("question-yes").textContent = yes;
  $("question-no").textContent = no;
  $("question-yes").className = danger ? "danger" : "primary";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), {once: true}));
}
