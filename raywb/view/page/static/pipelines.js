import { el } from "raywb/dom";
export function pipelines({ run }) { return [el("h1", null, run.name)]; }
