import { createInterface } from 'node:readline'
import { createRelayClient, type Identity } from './identify.ts'

// Reads identities from standard input, a line of JSON each, and sends them in batches. Prints a line for each identity
// that failed, and exits with 1 if there is one.

/** At most 2000 identities and 1 MiB fit into a batch. */
const BATCH_SIZE = 500

const { RELAY_URL: url = 'http://127.0.0.1:8080', RELAY_API_KEY: apiKey = '' } = process.env
const relay = createRelayClient({ url, apiKey })
let taken = 0

/** Batches follow one another, so that identities reach Mixpanel in the order of their lines. */
async function send (identities: Identity[]): Promise<void> {
  for (const { index, problem } of await relay.identifyBatch(identities)) {
    if (problem === undefined) {
      taken++
      continue
    }
    process.exitCode = 1
    const fields = problem.errors?.map(({ pointer, detail }) => ` ${pointer} ${detail}`).join() ?? ''
    console.log(`${identities[index]?.identified_id}: ${problem.code}${fields}`)
  }
}

let batch: Identity[] = []
for await (const line of createInterface({ input: process.stdin })) {
  batch.push(JSON.parse(line))
  if (batch.length < BATCH_SIZE) continue
  await send(batch)
  batch = []
}
if (batch.length > 0) await send(batch)
console.log(`identities accepted or queued: ${taken}`)
