import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Slices } from '../../concurrency/slices.ts'
import { isTooLarge } from '../../identity/event.ts'
import { checkRules, Identity, MAX_IDENTITY_BYTES, checkSize } from '../../identity/identity.ts'
import { parseAsJson, type Bodies } from '../body.ts'
import { problemResponses } from '../problem.ts'
import { fieldErrors } from '../validation.ts'
import type { Relay } from '../../relay/relay.ts'
import { answerQueued, toProblem, BODY_TYPES, identityRoute, Headers, prefersAsync, TOO_LONG } from './responses.ts'

const Flag = (description: string) =>
  Type.Optional(Type.Unsafe<'0' | '1'>({ type: 'string', enum: ['0', '1'], description }))

const Query = Type.Object({
  strict: Flag('`1`: Mixpanel validates the event, and its words come back.'),
  dry_run: Flag('`1`: answers the event that would be sent, its token masked, and sends nothing.')
}, { additionalProperties: false })

const MEANING = 'Mixpanel accepted the event, which does not mean that it has merged or will merge the two ids.'

const Accepted = Type.Object({ status: Type.Literal('accepted') })

const Queued = Type.Object({ status: Type.Literal('queued') }, {
  description: 'It is on disk in the outbox, and will be sent until Mixpanel takes it or refuses it. ' +
    'Only where OUTBOX is not off.'
})

/** The response to nearly every request, as Fastify would write it. */
const ACCEPTED = JSON.stringify({ status: 'accepted' })
const JSON_TYPE = 'application/json; charset=utf-8'
const sendAccepted = (reply: FastifyReply) => reply.header('content-type', JSON_TYPE).send(ACCEPTED)

const forgetBody = (request: FastifyRequest) => { request.body = undefined }

const Preview = Type.Object({
  event: Type.Literal('$identify'), properties: Type.Record(Type.String(), Type.Unknown())
}, { description: 'With dry_run=1: the event that would be sent.' })

/** A caller's own body is worth a look at so many fields: that takes a millisecond. */
const MAX_NAMED_FIELDS = 1000

/** Room for white space; what is longer is not read to its end. */
const BODY_LIMIT = 2 * MAX_IDENTITY_BYTES

interface Options { relay: Relay, bodies: Bodies, nextSlice: Slices }

/** `POST /identify`: one identity, and what became of it. */
export const identify: FastifyPluginAsyncTypebox<Options> = async (app, { relay, bodies, nextSlice }) => {
  bodies.accept(app, {
    types: BODY_TYPES, limit: BODY_LIMIT, share: 1, parse: parseAsJson(MAX_IDENTITY_BYTES, nextSlice)
  })

  app.post('/identify', {
    ...identityRoute,
    preValidation ({ body }, reply, done) {
      const errors = checkSize(body, MAX_NAMED_FIELDS)
      if (errors.length > 0) reply.problem('invalid_request', { errors })
      else done()
    },
    schema: {
      operationId: 'identify',
      summary: 'Tell Mixpanel that an anonymous user is this user',
      consumes: BODY_TYPES,
      body: Identity,
      querystring: Query,
      headers: Headers,
      response: {
        200: Type.Union([Accepted, Preview], { description: MEANING }), 202: Queued, ...problemResponses()
      }
    }
  }, async (request, reply) => {
    const errors = checkRules(request.body)
    if (request.validationError || errors.length > 0) {
      return reply.problem('invalid_request', { errors: [...fieldErrors(request), ...errors] })
    }
    const event = relay.toEvent(request.body)
    if (isTooLarge(event)) return reply.problem('invalid_request', { errors: [TOO_LONG] })
    // Not needed any more. While the event waits for Mixpanel it would hold as much memory again.
    forgetBody(request)
    if (request.query.dry_run === '1') return reply.send(relay.preview(event))
    reply.logLine.insert_id = event.insertId
    const isAsync = prefersAsync(request.headers.prefer)
    const verdict = await relay.identify(event, { isStrict: request.query.strict === '1', isAsync })
    if (verdict.code === 'accepted') return sendAccepted(reply)
    if ('cause' in verdict) reply.logLine.cause = verdict.cause
    if (verdict.code === 'queued') return answerQueued(reply, isAsync).send({ status: 'queued' })
    return reply.problem(...toProblem(verdict))
  })
}
