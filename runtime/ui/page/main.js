/** Starts the page. */

import "./actions.js";
import {$, ask, changed, form, page} from "./dom.js";
import {loadGallery} from "./gallery.js";
import {findJobs} from "./jobs.js";
import {complain} from "./messages.js";
import {buildModels} from "./models.js";
import {recallPictures} from "./pictures.js";
import {buildQuality} from "./quality.js";
import {recall} from "./request.js";

async function start() {
  if (/Mac|iPhone|iPad/.test(navigator.platform)) $("keys").textContent = "⌘ Enter";
  page.server = await ask("/api/info");
  $("folder").textContent = $("folder").title = `in ${page.server.output}`;
  buildQuality();
  await buildModels();
  recall();
  changed();
  await recallPictures();
  await findJobs();  // before the button works: a job posted meanwhile would be missing from the list
  $("generate").disabled = false;
  await loadGallery();
}

form.addEventListener("input", event => {
  event.target.removeAttribute("aria-invalid");
  if (event.target.id !== "sampler" && event.target.type !== "radio") changed();
});
// A file dropped beside the zones must not replace the page.
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, event => event.preventDefault());

start().catch(error => complain(error.message));
