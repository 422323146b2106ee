import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import type { FastifyContextConfig } from 'fastify'
import { problemResponses } from '../problem.ts'

const Health = Type.Object({
  status: Type.String({ description: '`alive`, `ready` or `draining`.', examples: ['ready'] }),
  parts: Type.Optional(Type.Record(Type.String(), Type.Unknown(), {
    description: 'With `?verbose`: the state of each part, for people. The state of Mixpanel never decides the status.'
  }))
}, { title: 'Health', description: 'The health of this instance.' })

/** Returns the state of each part, for people. */
type Parts = () => Record<string, unknown>

const ALIVE = '200 while the process runs.'
const READY = '200 while the instance accepts requests, and 503 from SIGTERM on.'

const unlogged = { unlogged: true } satisfies FastifyContextConfig

/** The health routes. Readiness does not depend on Mixpanel: to bypass or restart a relay ends no outage. */
export const health: FastifyPluginAsyncTypebox<{ parts: Parts }> = async (app, { parts }) => {
  const stateOf = (status: string, query: object) => 'verbose' in query ? { status, parts: parts() } : { status }
  const schema = (operationId: string, summary: string, description: string) => ({
    operationId,
    summary,
    description,
    tags: ['health'],
    querystring: Type.Object({
      verbose: Type.Optional(Type.String({ description: 'Adds `parts` to the response. It needs no value.' }))
    }),
    response: { 200: Health, ...problemResponses([400]) }
  })

  for (const name of ['livez', 'healthz']) {
    app.get(`/${name}`, { config: unlogged, schema: schema(name, 'Liveness', ALIVE) },
      async ({ query }) => stateOf('alive', query))
  }

  const ready = schema('readyz', 'Readiness', READY)
  app.get('/readyz', { config: unlogged, schema: { ...ready, response: { ...ready.response, 503: Health } } },
    async ({ query }, reply) => app.isShuttingDown()
      ? reply.code(503).send(stateOf('draining', query))
      : stateOf('ready', query))
}
