import { randomUUID } from 'node:crypto'
import { buildApp } from '../http/app.ts'
import { readConfig } from '../config.ts'
import { createLog } from '../log.ts'
import { createMixpanel } from '../mixpanel/client.ts'
import { openapi } from '../http/openapi.ts'
import { createRelay } from '../relay/relay.ts'
import { verifyCommand } from '../commands/verify.ts'
import { createSandbox, SANDBOX_ACCOUNT, SANDBOX_BOUNDS } from './app.ts'

// Runs the relay in front of a sandbox, in one process: sends some identities, prints the answers and what merged, and
// serves. The argument is the mode of the project.
const [, , mode = 'original'] = process.argv
if (mode !== 'original' && mode !== 'simplified') {
  console.error('Use npm run demo, or npm run demo -- simplified')
  process.exit(1)
}
const sandbox = createSandbox({ mode, serviceAccounts: [SANDBOX_ACCOUNT], ...SANDBOX_BOUNDS })
const sandboxUrl = await sandbox.app.listen({ host: '127.0.0.1', port: 0 })
const { PORT: port = '8080', CORS_ORIGINS: origins = '' } = process.env
const config = readConfig({
  MIXPANEL_TOKEN: 'sandbox-token',
  MIXPANEL_URL: sandboxUrl,
  MIXPANEL_ID_MERGE: mode,
  MIXPANEL_SERVICE_ACCOUNT: SANDBOX_ACCOUNT,
  MIXPANEL_PROJECT_ID: '1',
  PORT: port,
  CORS_ORIGINS: `http://127.0.0.1:${port},http://localhost:${port},${origins}`
}, () => '')
let isShown = false
const { logger, logRequest } = createLog('info', {
  write (line) {
    if (isShown) process.stdout.write(line)
  }
})
const client = createMixpanel(config)
const relay = createRelay(config, client, logger)
const app = await buildApp(config, {
  relay, logger, logRequest, document: async () => (await openapi(config)).document
})
const url = await app.listen({ host: config.HOST, port: config.PORT }).catch(async (error: Error) => {
  console.error(`${error.message}\nTry another port: PORT=18080 npm run demo`)
  return process.exit(1)
})
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, () => Promise.all([app.close().then(client.close), sandbox.app.close()]))
}

const phone = randomUUID()
const samples = [
  { what: 'a user signs in on the phone', identity: { identified_id: 'user-42', anon_id: phone } },
  { what: 'and on the web ($device: id)', identity: { identified_id: 'user-42', anon_id: `$device:${randomUUID()}` } },
  { what: 'the same phone again', identity: { identified_id: 'user-42', anon_id: phone } },
  { what: 'another user on that phone', identity: { identified_id: 'user-43', anon_id: phone } },
  { what: 'Mixpanel answers 0', identity: { identified_id: 'user-44', anon_id: randomUUID() }, refused: true },
  { what: 'junk: the frontend sent "null"', identity: { identified_id: 'null', anon_id: randomUUID() } },
  { what: 'junk: no id, and a token', identity: { identified_id: 'user-45', anon_id: 'none', token: 'x' } }
]

console.log(`The relay listens on ${url}, in front of a sandbox on ${sandboxUrl}.
The project has ${mode} ID merge.\n`)
console.log(`${'event'.padEnd(31)} ${'answer to the caller'.padEnd(47)} ledger of the sandbox`)
for (const { what, identity, refused } of samples) {
  const before = sandbox.ledger.rows().length
  // Twice, because the relay repeats the request to get the reason.
  if (refused) sandbox.faults.add({ name: 'refused', times: 2 })
  const answer = await fetch(`${url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(identity)
  })
  const body = await answer.json() as Record<string, string> & { errors?: { pointer: string }[] }
  const { status, code, detail, errors } = body
  const got = code === undefined ? status : `${code}: ${errors?.map(error => error.pointer).join(' ') ?? detail}`
  const row = sandbox.ledger.rows()[before]
  const ledger = row?.outcome ?? (refused ? 'nothing: refused' : 'nothing: not sent')
  console.log(`${what.padEnd(31)} ${`${answer.status} ${got}`.padEnd(47)} ${ledger}`)
}
const today = new Date().toISOString().slice(0, 10)
console.log(`
"accepted" means that Mixpanel answered 1. What merged stands only in Mixpanel, where verify --all reads it:
`)
const output = { stdin: process.stdin, report: console.log, exit () {} }
for await (const lines of verifyCommand(config, ['--from', today, '--to', today, '--all'], output)) {
  process.stdout.write(lines)
}
console.log(`
Watch the events and the clusters of ids in a browser: ${sandboxUrl}/

Send your own identity:

  curl -i ${url}/identify -H 'content-type: application/json' \\
    -d '{"identified_id":"you","anon_id":"${randomUUID()}"}'

Events in the sandbox: ${sandboxUrl}/__sandbox/events   API documentation: ${url}/docs   Ctrl-C stops the demo.`)
isShown = true
