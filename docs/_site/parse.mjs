// Reads diagrams as a JSON list from standard input, and writes what is wrong with each, or null: `node parse.mjs mermaid.tiny.js`.
// Mermaid parses without a browser, but for what cleans its labels, which wants to see one: here it cleans nothing.
import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

globalThis.window = { document: { nodeType: 9, implementation: {}, createElement: () => ({}) }, Element: class {}, Node: class {} };
runInThisContext(readFileSync(process.argv[2], "utf8"));
const answers = [];
for (const text of JSON.parse(readFileSync(0, "utf8"))) {
  answers.push(await globalThis.mermaid.parse(text).then(() => null, (error) => String(error)));
}
console.log(JSON.stringify(answers));
