/** Estimates how long a job still takes, from the seconds of its steps, and of the steps of earlier jobs like it. */

import {store, stored} from "./dom.js";

const MOST_KEPT = 50;   // kinds of jobs whose seconds this browser remembers

const kindOf = job => [job.bundle, job.engine, `${job.width}x${job.height}`, job.images].join(" ");

/** The seconds of a step of each stage, as far as they are known. */
export const newRates = job => ({...stored("rates")[kindOf(job)]});

/** Measure the steps since the first one of this stage that was seen. */
export function measure(job, {stage, index, first, elapsed}) {
  const from = job.from;
  if (!from || from.stage !== stage || from.first !== first) job.from = {stage, first, index, elapsed};
  else if (index > from.index) job.rates[stage] = (elapsed - from.elapsed) / (index - from.index);
}

/** Seconds until the last step of a job, after one of its steps; null while no step was ever measured. */
export function secondsLeft(steps, rates, {stage, index, first, last, of}) {
  const [prior, decoder] = [rates.prior ?? rates.decoder, rates.decoder ?? rates.prior];
  if (prior === undefined) return null;
  const left = stage === "prior" ? (steps.prior - index) * prior + steps.decoder * decoder : (steps.decoder - index) * decoder;
  const groups = Math.ceil((of - last) / (last - first + 1));
  return left + groups * (steps.prior * prior + steps.decoder * decoder);
}

export function rememberRates(job) {
  const kept = Object.entries(stored("rates")).filter(([kind]) => kind !== kindOf(job)).slice(1 - MOST_KEPT);
  store("rates", Object.fromEntries([...kept, [kindOf(job), job.rates]]));
}
