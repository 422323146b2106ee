import { setImmediate } from 'node:timers/promises'
import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import type { FastifyContextConfig } from 'fastify'
import { brokenRules, Identity, surplusNames, type FieldError } from '../../identity/identity.ts'
import { asFieldErrors, fieldErrors, problemBody, problemResponses, type Extras, type ProblemCode } from '../problem.ts'
import type { Relay } from '../../relay/relay.ts'
import { answerQueued, asProblem, BODY_TYPES, forIdentities, Headers, prefersAsync } from './responses.ts'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** The schema of the body for people, where the handler looks at some of it itself. */
    body?: object
  }
}

/** Mixpanel's own limit, with some 2 KB for each. */
const MAX_IDENTITIES = 2000
const BATCH_BODY_LIMIT = 4_194_304

/** So many are looked at in one turn of the event loop: others have to be served as well. */
const SLICE = 100

const identitiesOf = <T extends object>(items: T) => Type.Object({
  identities: Type.Array(Type.Unsafe<Identity>(items), { minItems: 1, maxItems: MAX_IDENTITIES })
}, { additionalProperties: false })

const Results = Type.Object({
  results: Type.Array(Type.Object({
    index: Type.Integer(),
    status: Type.String({ enum: ['accepted', 'queued', 'failed'] }),
    problem: Type.Optional(Type.Ref('Problem'))
  }))
}, {
  description: 'A verdict for each identity, in their order: 200 where all were accepted, 202 where all are accepted ' +
    'or queued, else 207.'
})

/** `POST /identify/batch`: many identities, and what became of each. */
export const batch: FastifyPluginAsyncTypebox<{ relay: Relay }> = async (app, { relay }) => {
  app.post('/identify/batch', {
    ...forIdentities,
    config: { ...forIdentities.config, body: identitiesOf(Identity) } satisfies FastifyContextConfig,
    bodyLimit: BATCH_BODY_LIMIT,
    async preValidation ({ body }, reply) {
      const errors = surplusNames(body)
      if (errors.length > 0) return reply.problem('invalid_request', { errors })
    },
    schema: {
      operationId: 'identifyBatch',
      summary: 'Up to 2000 identities, a verdict for each',
      consumes: BODY_TYPES,
      body: identitiesOf({}),
      querystring: Type.Object({}, { additionalProperties: false }),
      headers: Headers,
      response: { 200: Results, 202: Results, 207: Results, ...problemResponses() }
    }
  }, async (request, reply) => {
    if (request.validationError) return reply.problem('invalid_request', { errors: fieldErrors(request) })
    const isAsync = prefersAsync(request.headers.prefer)
    let retryAfter = 0

    /** What is wrong with one of them, its pointers relative to it. */
    function errorsOf (identity: unknown): FieldError[] {
      const surplus = surplusNames(identity)
      if (surplus.length > 0) return surplus
      const validate = request.compileValidationSchema(Identity)
      return [...validate(identity) ? [] : asFieldErrors(validate.errors), ...brokenRules(identity)]
    }

    async function resultOf (identity: Identity, index: number) {
      const errors = errorsOf(identity)
      const verdict = errors.length === 0 ? await relay.identify(relay.accept(identity), { isAsync }) : undefined
      if (verdict?.code === 'accepted' || verdict?.code === 'queued') return { index, status: verdict.code }
      const [code, extras]: [ProblemCode, Extras] = verdict ? asProblem(verdict) : ['invalid_request', { errors }]
      retryAfter = Math.max(retryAfter, extras.retryAfter ?? 0)
      return { index, status: 'failed', problem: problemBody(code, request.id, extras) }
    }

    const pending: ReturnType<typeof resultOf>[] = []
    for (const [index, identity] of request.body.identities.entries()) {
      if (index > 0 && index % SLICE === 0) await setImmediate()
      pending.push(resultOf(identity, index))
    }
    const results = await Promise.all(pending)
    const [queued, failed] = ['queued', 'failed']
      .map(wanted => results.filter(({ status }) => status === wanted).length)
    if (retryAfter > 0) reply.header('retry-after', retryAfter)
    Object.assign(reply.logLine, { identities: results.length, queued, failed })
    if (failed === 0 && queued !== 0) return answerQueued(reply, isAsync).send({ results })
    return reply.code(failed === 0 ? 200 : 207).send({ results })
  })
}
