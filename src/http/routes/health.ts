import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import type { FastifyContextConfig } from 'fastify'

const Health = Type.Object({
  status: Type.String({ examples: ['ready'] }),
  parts: Type.Optional(Type.Record(Type.String(), Type.Unknown()))
}, { description: 'With ?verbose also the parts, for people; Mixpanel among them, which never decides the status.' })

/** What goes on, for people. */
type Parts = () => Record<string, unknown>

const unlogged = { unlogged: true } satisfies FastifyContextConfig

/** For orchestrators. Readiness says nothing of Mixpanel: to bypass or restart a relay heals no outage. */
export const health: FastifyPluginAsyncTypebox<{ parts: Parts }> = async (app, { parts }) => {
  /** `?verbose` shows the parts. */
  const health = (status: string, query: object) => 'verbose' in query ? { status, parts: parts() } : { status }
  const schema = (operationId: string, summary: string) => ({
    operationId, summary, querystring: Type.Object({ verbose: Type.Optional(Type.String()) }), response: { 200: Health }
  })

  for (const name of ['livez', 'healthz']) {
    app.get(`/${name}`, { config: unlogged, schema: schema(name, 'Is the process alive?') },
      async ({ query }) => health('alive', query))
  }

  const ready = schema('readyz', 'May it be sent requests? Not from the moment of SIGTERM.')
  app.get('/readyz', { config: unlogged, schema: { ...ready, response: { 200: Health, 503: Health } } },
    async ({ query }, reply) => app.isShuttingDown()
      ? reply.code(503).send(health('draining', query))
      : health('ready', query))
}
