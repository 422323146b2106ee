// What many teams run: the official SDK behind Fastify, with Fastify's own log and @fastify/rate-limit.
import rateLimit from '@fastify/rate-limit'
import Fastify from 'fastify'
import Mixpanel from 'mixpanel'

const { hostname, port } = new URL(process.env.MIXPANEL_URL)
const mixpanel = Mixpanel.init(process.env.MIXPANEL_TOKEN, { host: `${hostname}:${port}`, protocol: 'http', keepAlive: true })
const app = Fastify({ logger: { level: 'info' } })
await app.register(rateLimit, { max: 1_000_000_000 })
app.post('/identify', async ({ body }, reply) => {
  const event = { distinct_id: body.identified_id, $identified_id: body.identified_id, $anon_id: body.anon_id }
  await new Promise((resolve, reject) => mixpanel.track('$identify', event, error => error ? reject(error) : resolve()))
  return { status: 'accepted' }
})
await app.listen({ port: Number(process.env.PORT) })
