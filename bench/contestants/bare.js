// A Fastify route with the relay's schema that relays nothing: no log, no limit, no hook. LATENCY_MS: waits, as Mixpanel does.
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import { createIdentityRules } from '../../dist/identity/identity.js'

const { schema } = createIdentityRules({ MIXPANEL_ID_MERGE: 'original', ANON_ID_FORMAT: 'uuid-v4' })
const latency = Number(process.env.LATENCY_MS ?? 0)
const app = Fastify()
app.post('/identify', { schema: { body: JSON.parse(JSON.stringify(schema)) } }, async () => {
  if (latency > 0) await sleep(latency)
  return { status: 'accepted' }
})
await app.listen({ port: Number(process.env.PORT) })
