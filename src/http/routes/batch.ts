import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import type { FastifyContextConfig, FastifyRequest } from 'fastify'
import type { Slices } from '../../concurrency/slices.ts'
import type { Config } from '../../config.ts'
import { isTooLarge, type PendingEvent } from '../../identity/event.ts'
import {
  MAX_IDENTITY_BYTES, checkSize, type FieldError, type Identity, type IdentityRules
} from '../../identity/identity.ts'
import { hasFailed, type Failure, type Verdict } from '../../identity/verdict.ts'
import type { Relay } from '../../relay/relay.ts'
import type { Bodies } from '../body.ts'
import { checkUtf8, outline, parseJson } from '../json.ts'
import {
  MAX_ERRORS, Problem, problemBody, problemResponses, type ProblemCode, type ProblemOptions
} from '../problem.ts'
import { asFieldErrors, checkIdentity, fieldErrors } from '../validation.ts'
import {
  answerQueued, toProblem, BODY_TYPES, identityRoute, Headers, prefersAsync, SECURITY, TOO_LONG
} from './responses.ts'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** The schema of the body for the OpenAPI document, when the handler validates the body itself. */
    body?: object
  }
}

/** The limit of Mixpanel's `/import`. */
const MAX_IDENTITIES = 2000

const BODY_LIMIT = 1_048_576

/** The rest of MAX_BYTES_IN_FLIGHT is left to single identities. */
const BODY_SHARE = 0.75

/** The most characters of the body with a number in the place of each identity. */
const MAX_OUTLINE = 16_384

const identitiesOf = <T extends object>(items: T) => Type.Object({
  identities: Type.Array(Type.Unsafe<Identity>(items), {
    minItems: 1, maxItems: MAX_IDENTITIES, description: `The identities, at most ${MAX_IDENTITIES}.`
  })
}, { additionalProperties: false, title: 'Batch', description: 'The body of a batch.' })

const DESCRIPTION = 'Treats every identity as `POST /identify` does, and gives each a verdict of its own. ' +
  'The whole request fails only when it is malformed or exceeds a limit.'

/** The body with a number in the place of each identity. */
const Outline = identitiesOf({})

const Results = Type.Object({
  results: Type.Array(Type.Object({
    index: Type.Integer({ description: 'The position in `identities`, from 0.' }),
    status: Type.String({
      enum: ['accepted', 'queued', 'failed'],
      description: 'The verdict. `accepted` and `queued` mean the same as for `POST /identify`.'
    }),
    problem: Type.Optional(Problem)
  }, { title: 'Result', description: 'The verdict on one identity.' }), {
    description: 'One result for each identity, in the order of the request.'
  })
}, {
  title: 'BatchResult',
  description: 'The status is 200 when all identities were accepted, 202 when all were accepted or queued, else 207. ' +
    `All problems together list at most ${MAX_ERRORS} fields; further problems have no \`errors\`.`
})

interface Options {
  relay: Relay
  config: Pick<Config, 'RATE_LIMIT_MAX'>
  rules: IdentityRules
  bodies: Bodies
  nextSlice: Slices
}

/** The event of an identity, or its broken rules. */
type Parsed = PendingEvent | FieldError[]

/** The problem of a whole batch. */
type Refusal = ProblemOptions & {
  code: ProblemCode
  /** How many identities it has, as far as that is known. */
  count: number
  headers?: Record<string, number>
}

/** The broken rules of an identity, its verdict, or the bug that it met. */
type Outcome = FieldError[] | Verdict | Error

/** `POST /identify/batch`: many identities and a verdict for each. */
export const batch: FastifyPluginAsyncTypebox<Options> = async (app, options) => {
  const { relay, config: { RATE_LIMIT_MAX: limit }, rules, bodies, nextSlice } = options
  bodies.accept(app, {
    types: BODY_TYPES, limit: BODY_LIMIT, share: BODY_SHARE, parse: (body, done) => done(null, body)
  })

  app.post('/identify/batch', {
    ...identityRoute,
    config: {
      body: identitiesOf(rules.schema), headers: Headers, callers: 'services', identities: 'many'
    } satisfies FastifyContextConfig,
    schema: {
      operationId: 'identifyBatch',
      summary: 'Merge many anonymous users',
      description: DESCRIPTION,
      tags: ['identities'],
      security: SECURITY,
      consumes: BODY_TYPES,
      querystring: Type.Object({}, { additionalProperties: false }),
      response: { 200: Results, 202: Results, 207: Results, ...problemResponses() }
    }
  }, async (request, reply) => {
    const looked = await readBatch(request)
    if (!Array.isArray(looked)) {
      const { code, count, headers = {} } = looked
      reply.logLine.outcomes = [{ outcome: 'failed', code, count }]
      return reply.headers(headers).problem(code, looked)
    }

    const isAsync = prefersAsync(request.headers.prefer)
    const options = { isAsync, isTrusted: true, failures: new Map<string, Verdict>() }
    const outcomes = await Promise.all(looked.map((one): Outcome | Promise<Outcome> =>
      Array.isArray(one) ? one : relay.identify(one, options).catch((bug: Error) => bug)))
    let retryAfter = 0
    let queued = 0
    let failed = 0
    const insertIds: string[] = []
    const failures = new Map<ProblemCode, number>()
    const results = outcomes.map((outcome, index) => {
      if ('code' in outcome && !hasFailed(outcome)) {
        if (outcome.code === 'queued') queued++
        insertIds.push((looked[index] as PendingEvent).insertId)
        return { index, status: outcome.code }
      }
      failed++
      if (outcome instanceof Error) reply.logUnhandledError(outcome)
      const [code, extras] = problemOf(outcome)
      failures.set(code, (failures.get(code) ?? 0) + 1)
      retryAfter = Math.max(retryAfter, extras.retryAfter ?? 0)
      return { index, status: 'failed', problem: problemBody(code, request.id, extras) }
    })
    if (retryAfter > 0) reply.header('retry-after', retryAfter)
    const counts = { identities: results.length, queued, failed, insert_ids: insertIds }
    reply.logLine.details = { ...reply.logLine.details, ...counts }
    reply.logLine.outcomes = [
      { outcome: 'accepted', code: 'accepted', count: results.length - queued - failed },
      { outcome: 'queued', code: 'queued', count: queued },
      ...Array.from(failures, ([code, count]) => ({ outcome: 'failed' as const, code, count }))
    ]
    if (failed === 0 && queued !== 0) return answerQueued(reply, isAsync).send({ results })
    return reply.code(failed === 0 ? 200 : 207).send({ results })
  })

  /**
   * Returns each identity of a batch as an event or its errors, or the problem of the whole batch. No variable of the
   * handler may hold the body while the events wait for Mixpanel: it takes as much memory again.
   */
  async function readBatch (request: FastifyRequest): Promise<Parsed[] | Refusal> {
    await nextSlice()
    const body = checkUtf8(request.body as Buffer | undefined ?? NO_BYTES)
    request.body = undefined
    const found = locateIdentities(request, body)
    const errors = 'errors' in found ? found.errors : fieldErrors(request)
    if ('errors' in found || errors.length > 0) return { code: 'invalid_request', count: 0, errors }
    const { count, bounds } = found
    if (count > limit) {
      const detail = `must not have more than ${limit} items, the limit of one caller (RATE_LIMIT_MAX)`
      return { code: 'invalid_request', count, errors: [{ pointer: '/identities', detail }] }
    }
    // The request itself counts as one already.
    const wait = count > 1 ? await app.countIdentities(request, count - 1) : undefined
    if (wait !== undefined) {
      const headers = { 'ratelimit-limit': limit, 'ratelimit-remaining': 0, 'ratelimit-reset': wait }
      return { code: 'too_many_requests', count, retryAfter: wait, headers }
    }
    // Nothing is sent until the whole body is known to be JSON.
    const looked: Parsed[] = []
    let room = MAX_ERRORS
    let isAnyObject = false
    for (let index = 0; index < count; index++) {
      await nextSlice()
      const one = readIdentity(request, body, bounds[2 * index] as number, bounds[2 * index + 1] as number)
      isAnyObject ||= one !== NOT_AN_OBJECT
      looked.push(Array.isArray(one) ? one.slice(0, room) : one)
      if (Array.isArray(one)) room = Math.max(0, room - one.length)
    }
    if (isAnyObject) return looked
    // A response with a problem for each of these would be a hundred times as long as the request.
    const named = looked.slice(0, MAX_ERRORS)
      .map((_, index) => ({ pointer: `/identities/${index}`, detail: MUST_BE_OBJECT }))
    return { code: 'invalid_request', count, errors: named }
  }

  /** Returns the event of an identity, or its errors with pointers relative to it. Throws when it is not JSON. */
  function readIdentity (request: FastifyRequest, body: Buffer, start: number, end: number): Parsed {
    if (end - start > MAX_IDENTITY_BYTES) return [TOO_LONG]
    const identity = parseJson(body, start, end)
    if (typeof identity !== 'object' || identity === null || Array.isArray(identity)) return NOT_AN_OBJECT
    const surplus = checkSize(identity)
    if (surplus.length > 0) return surplus
    const errors = checkIdentity(request, rules, identity)
    if (errors.length > 0) return errors
    const event = relay.toEvent(identity as Identity)
    return isTooLarge(event) ? [TOO_LONG] : event
  }
}

const NO_BYTES = Buffer.alloc(0)
const MUST_BE_OBJECT = 'must be object'
const NOT_AN_OBJECT: FieldError[] = [{ pointer: '', detail: MUST_BE_OBJECT }]

/** Returns the bounds of each identity in a body, or the errors of the body. Throws a BodyError when it is not JSON. */
function locateIdentities (
  request: FastifyRequest, body: Buffer
): { errors: FieldError[] } | { count: number, bounds: number[] } {
  const found = outline(body, MAX_IDENTITIES)
  if (found === undefined) {
    return { errors: [{ pointer: '/identities', detail: `must not have more than ${MAX_IDENTITIES} items` }] }
  }
  if (found.text.length > MAX_OUTLINE) {
    return { errors: [{ pointer: '', detail: 'must not have other fields than identities' }] }
  }
  const outer = parseJson(Buffer.from(found.text))
  const surplus = checkSize(outer)
  if (surplus.length > 0) return { errors: surplus }
  const validate = request.compileValidationSchema(Outline)
  if (!validate(outer)) return { errors: asFieldErrors(validate.errors) }
  // JSON.parse takes the last of two lists that have one name.
  const numbers = (outer as { identities: unknown[] }).identities as number[]
  return { count: numbers.length, bounds: numbers.flatMap(at => found.bounds.slice(2 * at, 2 * at + 2)) }
}

/** Returns the problem of an identity that is neither accepted nor queued. */
function problemOf (
  outcome: FieldError[] | Error | (Verdict & { code: Failure })
): [code: ProblemCode, options: ProblemOptions] {
  if (outcome instanceof Error) return ['internal', {}]
  if (!Array.isArray(outcome)) return toProblem(outcome)
  return ['invalid_request', outcome.length > 0 ? { errors: outcome } : { detail: UNLISTED }]
}

const UNLISTED = `The identity breaks a rule. This response lists ${MAX_ERRORS} fields already, and no more.`
