// A Fastify route with the relay's schema that relays nothing: no log, no limit, no hook. LATENCY_MS: waits, as Mixpanel does.
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import { Identity } from '../../dist/identity/identity.js'

const latency = Number(process.env.LATENCY_MS ?? 0)
const app = Fastify()
app.post('/identify', { schema: { body: JSON.parse(JSON.stringify(Identity)) } }, async () => {
  if (latency > 0) await sleep(latency)
  return { status: 'accepted' }
})
await app.listen({ port: Number(process.env.PORT) })
