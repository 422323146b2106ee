import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type, type Static } from '@sinclair/typebox'
import { brokenRules, Identity, type FieldError } from '../identity.ts'
import { fieldErrors, problemBody, problemResponses, type Extras, type ProblemCode } from '../problem.ts'
import type { Relay } from '../relay.ts'
import type { Verdict } from '../verdict.ts'

/** 2000 identities, Mixpanel's own limit, with some 2 KB for each. */
const MAX_BATCH = 2000
const BATCH_BODY_LIMIT = 4_194_304

const Flag = (description: string) =>
  Type.Optional(Type.Unsafe<'0' | '1'>({ type: 'string', enum: ['0', '1'], description }))

const Query = Type.Object({
  strict: Flag('`1`: Mixpanel validates the event, and its words come back.'),
  dry_run: Flag('`1`: answers the event that would be sent, its token masked, and sends nothing.')
}, { additionalProperties: false })

const MEANING = 'Mixpanel accepted the event, which does not mean that it has merged or will merge the two ids.'

const Accepted = Type.Object({ status: Type.Literal('accepted') })

/** The answer to nearly every request, as Fastify would write it. */
const ACCEPTED = JSON.stringify({ status: 'accepted' })
const JSON_TYPE = 'application/json; charset=utf-8'

const Preview = Type.Object({
  event: Type.Literal('$identify'), properties: Type.Record(Type.String(), Type.Unknown())
}, { description: 'With dry_run=1: the event that would be sent.' })

const Batch = Type.Object({
  identities: Type.Array(Identity, { minItems: 1, maxItems: MAX_BATCH })
}, { additionalProperties: false })

const Results = Type.Object({
  results: Type.Array(Type.Object({
    index: Type.Integer(),
    status: Type.String({ enum: ['accepted', 'failed'] }),
    problem: Type.Optional(Type.Ref('Problem'))
  }))
}, { description: 'A verdict for each identity, in their order. 207 where not all were accepted.' })

/** `POST /identify` and `POST /identify/batch`: every identity gets its own verdict. */
export const identify: FastifyPluginAsyncTypebox<{ relay: Relay }> = async (app, { relay }) => {
  // The handlers report what the schema found together with the rules that no schema can express.
  const options = { attachValidation: true, config: { rateLimit: {} } }
  const consumes = ['application/json', 'text/plain']

  app.post('/identify', {
    ...options,
    schema: {
      operationId: 'identify',
      summary: 'Tell Mixpanel that an anonymous user is this user',
      consumes,
      body: Identity,
      querystring: Query,
      response: { 200: Type.Union([Accepted, Preview], { description: MEANING }), ...problemResponses() }
    }
  }, async (request, reply) => {
    const errors = brokenRules(request.body)
    if (request.validationError || errors.length > 0) {
      return reply.problem('invalid_request', { errors: [...fieldErrors(request), ...errors] })
    }
    const event = relay.accept(request.body)
    if (request.query.dry_run === '1') return reply.send(relay.preview(event))
    reply.logLine.insert_id = event.properties.$insert_id
    const verdict = await relay.identify(event, request.query.strict === '1')
    if (verdict.code === 'accepted') return reply.header('content-type', JSON_TYPE).send(ACCEPTED as never)
    if ('cause' in verdict) reply.logLine.cause = verdict.cause
    return reply.problem(...asProblem(verdict))
  })

  app.post('/identify/batch', {
    ...options,
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
      consumes,
      body: Batch,
      querystring: Type.Object({}, { additionalProperties: false }),
      response: { 200: Results, 207: Results, ...problemResponses() }
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
    let retryAfter = 0
    const results = await Promise.all(request.body.identities.map(async (identity, index) => {
      const errors = [...broken.get(index) ?? [], ...brokenRules(identity)]
      const verdict = errors.length === 0 ? await relay.identify(relay.accept(identity)) : undefined
      if (verdict?.code === 'accepted') return { index, status: verdict.code }
      const [code, extras]: [ProblemCode, Extras] = verdict ? asProblem(verdict) : ['invalid_request', { errors }]
      retryAfter = Math.max(retryAfter, extras.retryAfter ?? 0)
      return { index, status: 'failed', problem: problemBody(code, request.id, extras) }
    }))
    const failed = results.filter(({ status }) => status === 'failed').length
    if (retryAfter > 0) reply.header('retry-after', retryAfter)
    Object.assign(reply.logLine, { identities: results.length, failed })
    return reply.code(failed === 0 ? 200 : 207).send({ results })
  })
}

/** A verdict's code is a problem's code: the table of problems is the table of verdicts. */
function asProblem (verdict: Exclude<Verdict, { code: 'accepted' }>): [code: ProblemCode, extras: Extras] {
  return [verdict.code, {
    ...'reason' in verdict && { detail: verdict.reason },
    ...'retryAfter' in verdict && { retryAfter: verdict.retryAfter }
  }]
}
