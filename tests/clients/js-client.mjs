// A program with the AWS SDK for JavaScript v3 as people write it: asks for credentials, says which it got,
// in one line of JSON.
//
// Usage: node js-client.mjs [ATTEMPTS]. Nothing is configured but the region. With STS_ENDPOINT it also asks
// that STS whose credentials they are. Exits 3 when an attempt got none.

import { createRequire } from "node:module";

// Not `import`: only `require` looks into NODE_PATH, and the packages are not installed beside this file.
const require = createRequire(import.meta.url);
const { defaultProvider } = require("@aws-sdk/credential-provider-node");
const { GetCallerIdentityCommand, STSClient } = require("@aws-sdk/client-sts");
const { version } = require("@aws-sdk/client-sts/package.json");

const describe = (error) => `${error.name}: ${error.message}`;

const report = { client: "js", version, attempts: [], identity: null, identity_error: null };
let credentials;
for (let left = Number(process.argv[2] ?? 2); left > 0; left--) {
  const attempt = { access_key: null, error: null };
  // A provider of its own for each attempt: one remembers what it has loaded.
  const provider = defaultProvider();
  const begin = performance.now();
  try {
    credentials = await provider();
    attempt.access_key = credentials.accessKeyId;
  } catch (error) {
    attempt.error = describe(error);
  }
  attempt.ms = Number((performance.now() - begin).toFixed(3));
  report.attempts.push(attempt);
}

const endpoint = process.env.STS_ENDPOINT;
if (endpoint && credentials) {
  try {
    const sts = new STSClient({ endpoint, credentials });
    report.identity = (await sts.send(new GetCallerIdentityCommand({}))).Arn;
  } catch (error) {
    report.identity_error = describe(error);
  }
}
console.log(JSON.stringify(report));
process.exitCode = report.attempts.some((attempt) => attempt.error) ? 3 : 0;
