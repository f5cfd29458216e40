/** Messages of the form, and questions that wait for an answer. */

import {$, make, namedFields, sentence} from "./dom.js";

/** Show what is wrong, and mark the fields that the message names. */
export function complain(message) {
  say($("error"), message && sentence(message));
  if (message) $("notice").hidden = true;
  for (const field of namedFields()) {
    const named = message && new RegExp(`(^|\\W)${field.name}(\\W|$)`).test(message.split(";")[0]);
    if (named) field.setAttribute("aria-invalid", "true"); else field.removeAttribute("aria-invalid");
    if (named && field.closest("details")) field.closest("details").open = true;
  }
}

/** Say something; with `action` a button does it. */
export function notice(message, action = "", does = null) {
  const doing = () => { notice(""); does(); };
  say($("notice"), message, does && make("button", {type: "button", className: "chip", onclick: doing}, action));
}

/** Fill a message's box; without a text it is hidden. */
function say(box, text, button = null) {
  const close = make("button", {type: "button", className: "close", ariaLabel: "Dismiss", title: "Dismiss",
    onclick: () => { box.hidden = true; }}, "×");
  box.replaceChildren(make("span", {}, text), ...(button ? [button] : []), close);
  box.hidden = !text;
}

let answer = null;  // resolves the question that was asked last

// The browser tells of a closed dialog a moment later. By then the next question may be open.
$("question").addEventListener("close", () => { if (!$("question").open) answer($("question").returnValue === "yes"); });

/** Ask a question in a dialog. Resolves to whether `yes` was pressed; Escape means no. */
export function confirmed(title, text, yes, {no = "Cancel", danger = false} = {}) {
  const dialog = $("question");
  answer?.(false);
  $("question-title").textContent = title;
  $("question-text").textContent = text;
  $("question-yes").textContent = yes;
  $("question-no").textContent = no;
  $("question-yes").className = danger ? "danger" : "primary";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve => { answer = resolve; });
}
