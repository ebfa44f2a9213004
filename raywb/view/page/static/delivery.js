import { el } from "raywb/dom";
export function delivery({ run }) { return [el("h1", null, run.name)]; }
export function noteDelivery() {}
