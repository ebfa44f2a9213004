/** Numbers, times and sizes as a person reads them. */

const MINUS = "−";

/** Made once: a formatter costs more than what it formats. */
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const FOUR_DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

/** A value of a series: four figures that matter. */
export function value(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  let text;
  if (Number.isInteger(number) && size < 1e6) text = WHOLE.format(size);
  else if (size >= 1e15 || size < 1e-3) text = size.toExponential(2);
  else if (size >= 1e6) text = compact(size);
  else text = FOUR_DIGITS.format(size);
  return number < 0 ? MINUS + text : text;
}

/** A count: all of its digits, in groups of three. */
export function count(number) {
  return number === null || number === undefined ? "–" : WHOLE.format(number);
}

/** A number in four characters or so: 12.3k, 4.56M. */
export function compact(number) {
  const size = Math.abs(number);
  for (const [limit, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return `${Number((number / (sign === "k" ? 1e3 : limit)).toPrecision(3))}${sign}`;
  }
  return String(Number(number.toPrecision(4)));
}

/** A percentage; 100 only where it is all. */
export function percent(number) {
  if (number === null || number === undefined) return "–";
  if (number > 99 && number < 100) return `${Math.floor(number * 10) / 10} %`;
  return `${number > 0 && number < 10 ? number.toFixed(1) : Math.round(number)} %`;
}

export function perSecond(number, what = "") {
  if (number === null || number === undefined) return "–";
  return `${value(number)}${what ? ` ${what}` : ""}/s`;
}

/** A length of time: `41 ms`, `4.2 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 0) return `${MINUS}${duration(-seconds)}`;
  if (seconds > 0 && seconds < 0.001) return "< 1 ms";
  if (seconds > 0 && seconds < 0.0995) return `${Number((seconds * 1000).toPrecision(2))} ms`;
  if (seconds < 1) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** A moment, in the time of who reads it: the day only where it is not today. */
export function moment(seconds, nowSeconds = Date.now() / 1000) {
  if (!seconds) return "–";
  const date = new Date(seconds * 1000);
  const time = date.toLocaleTimeString("en-GB");
  if (date.toDateString() === new Date(nowSeconds * 1000).toDateString()) return time;
  return `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())} ${time}`;
}

function pad(number) {
  return String(number).padStart(2, "0");
}

export function gb(number) {
  if (number === null || number === undefined) return "–";
  return number >= 1000 ? `${Number((number / 1024).toPrecision(3))} TB` : `${Number(number.toPrecision(3))} GB`;
}

export function bytes(number) {
  if (number < 1024) return `${count(number)} B`;
  if (number < 1024 ** 2) return `${Number((number / 1024).toPrecision(3))} kB`;
  if (number < 1024 ** 3) return `${Number((number / 1024 ** 2).toPrecision(3))} MB`;
  return gb(number / 1024 ** 3);
}

/** `3 rows`, `1 row`. */
export function counted(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** `bin_idx_tokenization_stage` as words. */
export function words(name) {
  return name.replaceAll("_", " ");
}
