import { el } from "raywb/dom";
export function nodes({ run }) { return [el("h1", null, run.name)]; }
