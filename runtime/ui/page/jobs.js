/** Jobs: submitting the form, watching the first job that is not finished, the queue of the others. */

import {$, ask, imagesChanged, make, post} from "./dom.js";
import {complain, confirmed, notice} from "./messages.js";
import {endProgress, phase, restart, showProgress, showStep} from "./progress.js";
import {request, saysNothing} from "./request.js";
import {clearResult, showDrafts, showImages} from "./result.js";

let jobs = [];        // unfinished ones, the one that is watched first
let source = null;    // of its events

/** Generate what the form says. An empty prompt is asked about first, unless `asked` says that it was. */
export async function submit({asked = false} = {}) {
  if ($("generate").disabled) return;
  complain("");
  notice("");
  if (!asked && saysNothing() && !await generatesNothing()) return $("prompt").focus();
  $("generate").disabled = true;
  try {
    jobs.push(await post("/api/jobs", request()));
    follow();
    if (matchMedia("(max-width: 900px)").matches) $("stage").scrollIntoView({block: "start", behavior: "smooth"});
  } catch (error) {
    complain(error.message);
  } finally {
    $("generate").disabled = false;
  }
}

const generatesNothing = () => confirmed("Generate without a prompt?",
  "The prompt is empty, so the image will show anything.", "Generate anyway", {no: "Write a prompt"});

/** Find the jobs that another visit left. */
export async function findJobs() {
  jobs = (await ask("/api/jobs")).jobs;
  follow();
}

/** Watch the first unfinished job, if none is watched; list the others. */
function follow() {
  listQueue();
  if (source || !jobs.length) return;
  const job = jobs[0];
  source = new EventSource(`/api/jobs/${job.id}/events`);
  for (const [name, handle] of Object.entries(EVENTS)) {
    source.addEventListener(name, event => { if (event.data !== undefined) handle(job, JSON.parse(event.data)); });
  }
  source.addEventListener("error", event => { if (event.data === undefined) lost(job); });
  showProgress(job);
  clearResult("Generating", job.prompt || "without a prompt");
  phase("Queued");
}

/** The connection broke, which the browser calls an error too. It tries again unless the server refused. */
function lost(job) {
  if (source.readyState !== EventSource.CLOSED) phase("The server does not answer");
  else finish(job, "", () => complain("The server knows nothing of this job; it may have been started again."));
}

const EVENTS = {
  queued: (job, {ahead}) => phase(ahead ? `Waiting, ${ahead} before it` : "Queued"),
  opening: (job, {loras}) => {
    restart(job);
    phase(loras ? `Merging ${loras > 1 ? `${loras} LoRAs` : "the LoRA"} into ${job.bundle}` : `Opening ${job.bundle}`);
  },
  started: job => {
    restart(job);
    phase("Reading the prompt, loading the prior");
  },
  notes: (job, {messages}) => {
    $("notes").replaceChildren(...messages.map(text => make("li", {}, text)));
    $("notes").hidden = false;
  },
  step: showStep,
  preview: (job, {pictures}) => showDrafts(pictures),
  done: (job, {images}) => finish(job, "Generated in", () => showImages(images)),
  cancelled: (job, {images}) => finish(job, "Cancelled after", () => showImages(images)),
  error: (job, {message, images}) => finish(job, "", () => {
    showImages(images);
    complain(message);
  }),
};

/** A job is over: go on to the next one, or rest. */
function finish(job, text, tell) {
  source.close();
  source = null;
  jobs = jobs.filter(other => other !== job);
  endProgress(job, text);
  tell();
  imagesChanged();
  follow();
}

function listQueue() {
  const waiting = jobs.slice(1);
  $("queue").hidden = !waiting.length;
  $("queue").replaceChildren(...waiting.map(job => {
    const drop = make("button", {type: "button", ariaLabel: `Remove ${job.prompt || "it"} from the queue`}, "Remove");
    drop.addEventListener("click", () => cancel(job));
    return make("li", {}, make("span", {}, job.prompt || "(no prompt)"), drop);
  }));
  $("generate-name").textContent = jobs.length ? "Add to the queue" : "Generate";
}

async function cancel(job) {
  const watched = job === jobs[0];
  if (watched) { $("cancel").disabled = true; phase("Cancelling after this step"); }
  try { await post(`/api/jobs/${job.id}/cancel`); }
  catch (error) { complain(error.message); }
  if (!watched) { jobs = jobs.filter(other => other !== job); listQueue(); }
}

$("cancel").addEventListener("click", () => cancel(jobs[0]));
