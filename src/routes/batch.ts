import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type, type Static } from '@sinclair/typebox'
import { brokenRules, Identity, type FieldError } from '../identity.ts'
import { fieldErrors, problemBody, problemResponses, type Extras, type ProblemCode } from '../problem.ts'
import type { Relay } from '../relay.ts'
import { answerQueued, asProblem, BODY_TYPES, forIdentities, Headers, prefersAsync } from './answers.ts'

/** 2000 identities, Mixpanel's own limit, with some 2 KB for each. */
const MAX_BATCH = 2000
const BATCH_BODY_LIMIT = 4_194_304

const Batch = Type.Object({
  identities: Type.Array(Identity, { minItems: 1, maxItems: MAX_BATCH })
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
    bodyLimit: BATCH_BODY_LIMIT,
    // The schema says the same, but only after it has named what is wrong with each of a million empty identities.
    async preValidation ({ body }, reply) {
      const { identities } = Object(body) as Partial<Static<typeof Batch>>
      if (Array.isArray(identities) && identities.length > MAX_BATCH) {
        const errors = [{ pointer: '/identities', detail: `must not have more than ${MAX_BATCH} items` }]
        return reply.problem('invalid_request', { errors })
      }
    },
    schema: {
      operationId: 'identifyBatch',
      summary: 'Up to 2000 identities, a verdict for each',
      consumes: BODY_TYPES,
      body: Batch,
      querystring: Type.Object({}, { additionalProperties: false }),
      headers: Headers,
      response: { 200: Results, 202: Results, 207: Results, ...problemResponses() }
    }
  }, async (request, reply) => {
    const whole: FieldError[] = []
    const broken = new Map<number, FieldError[]>()
    for (const { pointer, detail } of fieldErrors(request)) {
      const [, index, field] = /^\/identities\/(\d+)(.*)$/s.exec(pointer) ?? []
      const errors = field === undefined ? whole : broken.get(Number(index)) ?? []
      if (field !== undefined) broken.set(Number(index), errors)
      errors.push({ pointer: field ?? pointer, detail })
    }
    if (whole.length > 0) return reply.problem('invalid_request', { errors: whole })
    const isAsync = prefersAsync(request.headers.prefer)
    let retryAfter = 0
    const results = await Promise.all(request.body.identities.map(async (identity, index) => {
      const errors = [...broken.get(index) ?? [], ...brokenRules(identity)]
      const verdict = errors.length === 0 ? await relay.identify(relay.accept(identity), { isAsync }) : undefined
      if (verdict?.code === 'accepted' || verdict?.code === 'queued') return { index, status: verdict.code }
      const [code, extras]: [ProblemCode, Extras] = verdict ? asProblem(verdict) : ['invalid_request', { errors }]
      retryAfter = Math.max(retryAfter, extras.retryAfter ?? 0)
      return { index, status: 'failed', problem: problemBody(code, request.id, extras) }
    }))
    const [queued, failed] = ['queued', 'failed']
      .map(wanted => results.filter(({ status }) => status === wanted).length)
    if (retryAfter > 0) reply.header('retry-after', retryAfter)
    Object.assign(reply.logLine, { identities: results.length, queued, failed })
    if (failed === 0 && queued !== 0) return answerQueued(reply, isAsync).send({ results })
    return reply.code(failed === 0 ? 200 : 207).send({ results })
  })
}
