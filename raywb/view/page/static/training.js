import { el } from "raywb/dom";
export function training({ run }) { return [el("h1", null, run.name)]; }
