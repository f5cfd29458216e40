/** What can be done with a finished image: the buttons below the result, and those of the viewer. */

import {$, changed, form, onChange, page, post} from "./dom.js";
import {submit} from "./jobs.js";
import {complain} from "./messages.js";
import {put, upload, zones} from "./pictures.js";
import {useSettings} from "./request.js";
import {selectedImage} from "./result.js";
import {removeImage} from "./trash.js";
import {closeViewer, viewedImage} from "./viewer.js";

const ACTIONS = {
  use: image => { closeViewer(); useSettings(image); $("prompt").focus(); },
  again: image => generate(image, {seed: true}),
  vary: image => generate(image, {seed: false}),
  start: startFrom,
  remove: removeImage,
  folder: () => post("/api/folder/open").catch(error => complain(error.message)),
};

/** Generate with an image's settings, unless a picture that it was made from is gone. */
function generate(image, options) {
  closeViewer();
  if (useSettings(image, options)) return submit({asked: true});
}

async function startFrom(image) {
  closeViewer();
  try {
    const file = await (await fetch(image.url)).blob();
    put(zones.init_image, {id: await upload(file), file: image.name});
    for (const name of ["width", "height"]) $(name).value = image[name];
    changed();
    $("pictures").open = true;
    $("strength").focus();
  } catch (error) { complain(error.message); }
}

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", () => ACTIONS[button.dataset.do](button.closest("dialog") ? viewedImage() : selectedImage()));
}

onChange(() => {
  for (const button of document.querySelectorAll("[data-do=start]")) button.hidden = !page.info.features.init_image;
  for (const button of document.querySelectorAll("[data-do=folder]")) button.hidden = !page.server.opens_folder;
});

form.addEventListener("submit", event => { event.preventDefault(); submit(); });
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    submit();
  }
});
