import { el } from "raywb/dom";
export function overview({ run }) { return [el("h1", null, run.name)]; }
