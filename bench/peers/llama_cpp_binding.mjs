// Loads node-llama-cpp from the directory it was installed in (see bench/peers/install.py).

import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";

/** `{module, version}`: the imported package and its version. */
export async function load_binding(directory) {
    const root = path.resolve(directory);
    const entry = createRequire(path.join(root, "package.json")).resolve("node-llama-cpp");
    const {version} = JSON.parse(readFileSync(path.join(root, "node_modules", "node-llama-cpp", "package.json"), "utf8"));
    return {module: await import(pathToFileURL(entry).href), version};
}
