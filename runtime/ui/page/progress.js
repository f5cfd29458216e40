/** The progress of the job that is watched: its phase, its steps, and the time. */

import {$, clock, page} from "./dom.js";
import {measure, newRates, rememberRates, secondsLeft} from "./eta.js";

let watched = null;

export function showProgress(job) {
  watched = Object.assign(job, {began: performance.now(), rates: newRates(job), left: null});
  $("progress").classList.remove("over");
  $("progress").hidden = $("track").hidden = $("cancel").hidden = false;
  $("cancel").disabled = false;
  $("no-preview").hidden = $("notes").hidden = true;
  showSteps(job, {prior: 0, decoder: 0}, "");
}

/** The job runs from now on: its time counts from here. */
export function restart(job) {
  job.began = performance.now();
}

export function showStep(job, event) {
  const {stage, index, steps, first, last, of, elapsed} = event;
  job.began = performance.now() - elapsed * 1000;
  job.steps[stage] = steps;
  measure(job, event);
  const left = secondsLeft(job.steps, job.rates, event);
  job.left = left === null ? null : elapsed + left;
  const some = first === last ? `image ${first}` : `images ${first} to ${last}`;
  const batch = of === 1 ? "" : last - first + 1 === of ? ` · ${of} images` : ` · ${some} of ${of}`;
  const done = {prior: stage === "prior" ? index : job.steps.prior, decoder: stage === "decoder" ? index : 0};
  showSteps(job, done, batch);
  const over = index === steps;
  phase(stage === "prior" ? (over ? "Loading the decoder" : "Composing") : (over ? "Finishing" : "Adding detail"));
  document.title = `${done.prior + done.decoder}/${job.steps.prior + job.steps.decoder} · cascadekit`;
  const blind = stage === "prior" && !page.info.features.previews.includes("prior");
  $("no-preview").hidden = !blind;
  if (blind) $("no-preview").textContent = "This bundle has no previewer, so there is nothing to see of the prior's steps"
    + ($("preview_decoder").checked ? "; the decoder's will show." : ".");
}

function showSteps(job, done, batch) {
  const sum = job.steps.prior + job.steps.decoder;
  for (const stage of ["prior", "decoder"]) {
    const track = $(`${stage}-track`);
    track.style.flex = job.steps[stage];
    track.firstChild.style.width = `${100 * done[stage] / job.steps[stage]}%`;
  }
  $("track").ariaValueMax = sum;
  $("track").ariaValueNow = done.prior + done.decoder;
  $("steps").textContent = `prior ${done.prior} of ${job.steps.prior} · decoder ${done.decoder} of ${job.steps.decoder}${batch}`;
  $("track").ariaValueText = $("steps").textContent;
}

/** What goes on, said aloud when it changes; what takes a while before the next step breathes. */
export function phase(text) {
  if ($("phase").textContent !== text) $("live").textContent = text;
  $("phase").textContent = text;
  $("progress").classList.toggle("waiting", /^(Waiting|Queued|Reading|Opening|Merging)/.test(text));
}

/** The job is over, and `text` says how; its time follows. */
export function endProgress(job, text) {
  watched = null;
  rememberRates(job);
  $("track").hidden = $("cancel").hidden = $("no-preview").hidden = true;
  $("steps").textContent = $("elapsed").textContent = "";
  document.title = "cascadekit";
  $("progress").classList.add("over");
  $("progress").hidden = !text;
  phase(text && `${text} ${clock(secondsOf(job))}`);
}

const secondsOf = job => (performance.now() - job.began) / 1000;

function showTime() {
  if (!watched) return;
  const seconds = secondsOf(watched);
  const left = watched.left === null ? 0 : watched.left - seconds;
  $("elapsed").textContent = clock(seconds) + (left >= 1 ? ` · about ${clock(Math.ceil(left))} left` : "");
}

setInterval(showTime, 250);
