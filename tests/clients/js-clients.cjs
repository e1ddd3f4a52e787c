// The JavaScript packages that find credentials by themselves: one function for each, named on the command line.
// Nothing is configured but the region. When to ask and what to print is in README.md.

const endpoint = process.env.STS_ENDPOINT;
const region = process.env.AWS_REGION;
const address = new URL(endpoint ?? "http://127.0.0.1");

// Each makes a fresh pair: a function that loads the access key, and one that asks whose it is.
const clients = {
  js() {
    const { defaultProvider } = require("@aws-sdk/credential-provider-node");
    const { GetCallerIdentityCommand, STSClient } = require("@aws-sdk/client-sts");
    const credentials = defaultProvider();
    return {
      load: async () => (await credentials()).accessKeyId,
      identify: async () => (await new STSClient({ endpoint, credentials }).send(new GetCallerIdentityCommand({}))).Arn,
    };
  },
  "aws-sdk"() {
    const AWS = require("aws-sdk");
    // Without a logger it never comes back from loading what has less than 15 s left: its own warning is a TypeError.
    AWS.config.logger = console;
    const chain = new AWS.CredentialProviderChain();
    let credentials;
    return {
      load: async () => {
        credentials ??= await chain.resolvePromise();
        await credentials.getPromise();
        return credentials.accessKeyId;
      },
      identify: async () =>
        (await new AWS.STS({ endpoint, region, credentials }).getCallerIdentity().promise()).Arn,
    };
  },
  "aws-crt"() {
    const { auth, http, io } = require("aws-crt");
    const provider = auth.AwsCredentialsProvider.newDefault(new io.ClientBootstrap());
    // It hands out no credentials, but signs with them; what it has signed is sent.
    let request;
    return {
      load: async () => {
        const headers = new http.HttpHeaders([["host", address.host]]);
        request = new http.HttpRequest("GET", "/?Action=GetCallerIdentity&Version=2011-06-15", headers);
        const algorithm = auth.AwsSigningAlgorithm.SigV4;
        const signature_type = auth.AwsSignatureType.HttpRequestViaHeaders;
        await auth.aws_sign_request(request, { algorithm, signature_type, provider, region, service: "sts" });
        return request.headers.get("authorization").match(/Credential=([^/]+)/)[1];
      },
      identify: async () => {
        const headers = Object.fromEntries([...request.headers].filter(([name]) => name !== "host"));
        const text = await (await fetch(endpoint + request.path, { headers })).text();
        return text.match(/<Arn>(.*)<\/Arn>/)[1];
      },
    };
  },
  "@aws-lite/client"() {
    const make = require("@aws-lite/client");
    let text;
    return {
      load: async () => {
        const aws = await make({ region, plugins: [] });
        text = String((await aws({ service: "s3", endpoint: `${endpoint}/bucket/whoami`, rawResponsePayload: true })).payload);
        return text.split("\n")[1];
      },
      identify: async () => text.split("\n")[0],
    };
  },
};
const packages = { js: "@aws-sdk/client-sts" };

const tell = (word, text) => console.log(`${word} ${String(text).replace(/\s+/g, " ").trim()}`);
const describe = (error) => `${error.name}: ${error.message}`;

// Of a client that never answers, which would otherwise end the program without a word.
const tooLate = () => new Promise((_, reject) => setTimeout(() => reject(new Error("no answer in 20 s")), 20_000));

async function main() {
  const [name, times] = process.argv.slice(2);
  const watch = times === "watch";
  const path = require("node:path");
  const modules = process.env.NODE_PATH;
  tell("version", require(path.join(modules, packages[name] ?? name, "package.json")).version);
  let made = clients[name]();
  let last;
  for (let left = watch ? Infinity : Number(times); left > 0; left--) {
    const begin = performance.now();
    try {
      const key = await Promise.race([made.load(), tooLate()]);
      const took = performance.now() - begin;
      if (!watch || key !== last) {
        tell("key", `${key} ${took.toFixed(1)}`);
        if (endpoint) {
          await made.identify().then(
            (arn) => tell("identity", arn),
            (error) => tell("identity-error", describe(error)),
          );
        }
      }
      last = key;
    } catch (error) {
      tell("error", describe(error));
      // Version 3's default chain never recovers from a failure, so that a program has to make another.
      if (name === "js") made = clients[name]();
    }
    if (watch) await new Promise((done) => setTimeout(done, 300));
    else made = clients[name]();
  }
}

// Version 3 renews ahead of time by a promise that nobody waits for; when that fails, it ends a program that does not listen.
process.on("unhandledRejection", (error) => tell("error", describe(error)));
setInterval(() => {}, 1000);
main().then(() => process.exit());
