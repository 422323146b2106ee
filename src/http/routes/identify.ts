import type { FastifyPluginAsyncTypebox } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import type { FastifyContextConfig, FastifyReply, FastifyRequest } from 'fastify'
import type { Slices } from '../../concurrency/slices.ts'
import { isOpenLoopback, type Config } from '../../config.ts'
import { isTooLarge } from '../../identity/event.ts'
import { MAX_IDENTITY_BYTES, checkSize, type IdentityRules } from '../../identity/identity.ts'
import { hasFailed } from '../../identity/verdict.ts'
import { parseAsJson, type Bodies } from '../body.ts'
import { problemResponses } from '../problem.ts'
import { fieldErrors } from '../validation.ts'
import type { Relay } from '../../relay/relay.ts'
import {
  answerQueued, toProblem, BODY_TYPES, identityRoute, Headers, prefersAsync, SECURITY, TOO_LONG
} from './responses.ts'

const Flag = (description: string) =>
  Type.Optional(Type.Unsafe<'0' | '1'>({ type: 'string', enum: ['0', '1'], description }))

const Query = Type.Object({
  strict: Flag('`1`: Mixpanel validates the event, and a 422 carries its reason.'),
  dry_run: Flag('`1`: respond with the event that would be sent, its token masked, and send nothing.')
}, { additionalProperties: false })

const DESCRIPTION = 'Sends one event that merges two ids: `anon_id` becomes another id of the user `identified_id`. ' +
  'Mixpanel cannot undo a merge, and the first merge of an anonymous id wins. Repeating a request is safe.'

const MEANING = 'Mixpanel accepted the event. This does not mean that it merged the two ids, or will.'

const Accepted = Type.Object({
  status: Type.Literal('accepted', { description: 'Mixpanel accepted the event.' })
}, { title: 'Accepted', description: MEANING })

const Queued = Type.Object({
  status: Type.Literal('queued', { description: 'The outbox has stored the event.' })
}, {
  title: 'Queued',
  description: 'The outbox has stored the event, and sends it until Mixpanel accepts or refuses it. ' +
    'Only while OUTBOX is not `off`.'
})

/** The response to nearly every request, as Fastify would write it. */
const ACCEPTED = JSON.stringify({ status: 'accepted' })
const JSON_TYPE = 'application/json; charset=utf-8'

/** Sends it. A handler that returns it as well would wait for it once more: a reply is thenable. */
function sendAccepted (reply: FastifyReply): void {
  reply.header('content-type', JSON_TYPE).send(ACCEPTED)
}

const forgetBody = (request: FastifyRequest) => { request.body = undefined }

const Preview = Type.Object({
  event: Type.String({ description: 'The name of the event.', examples: ['$identify'] }),
  properties: Type.Record(Type.String(), Type.Unknown(), {
    description: 'The properties of the event. The token is masked.'
  })
}, { title: 'Preview', description: 'With `dry_run=1`: the event that would be sent.' })

/** The most fields that are validated: a thousand take a millisecond. */
const MAX_VALIDATED_FIELDS = 1000

/** Leaves room for white space. A longer body is not read to its end. */
const BODY_LIMIT = 2 * MAX_IDENTITY_BYTES

interface Options { relay: Relay, config: Config, rules: IdentityRules, bodies: Bodies, nextSlice: Slices }

/** `POST /identify`: one identity and its verdict. */
export const identify: FastifyPluginAsyncTypebox<Options> = async (app, options) => {
  const { relay, config, rules, bodies, nextSlice } = options
  const isOpen = isOpenLoopback(config)
  bodies.accept(app, {
    types: BODY_TYPES, limit: BODY_LIMIT, share: 1, parse: parseAsJson(MAX_IDENTITY_BYTES, nextSlice)
  })

  app.post('/identify', {
    ...identityRoute,
    config: { headers: Headers, callers: 'all', identities: 'one' } satisfies FastifyContextConfig,
    preValidation ({ body }, reply, done) {
      const errors = checkSize(body, MAX_VALIDATED_FIELDS)
      if (errors.length > 0) reply.problem('invalid_request', { errors })
      else done()
    },
    schema: {
      operationId: 'identify',
      summary: 'Merge an anonymous user into a known one',
      description: DESCRIPTION,
      tags: ['identities'],
      security: SECURITY,
      consumes: BODY_TYPES,
      body: rules.schema,
      querystring: Query,
      response: {
        200: Type.Union([Accepted, Preview], { description: MEANING }), 202: Queued, ...problemResponses()
      }
    }
  }, async (request, reply) => {
    const errors = rules.check(request.body)
    if (request.validationError || errors.length > 0) {
      const hints = rules.explain(request.body)
      return reply.problem('invalid_request', { errors: [...fieldErrors(request), ...hints, ...errors] })
    }
    const { caller } = request
    if (caller.kind === 'user' && caller.userId !== request.body.identified_id) {
      const detail = `identified_id is not the user of the token (${config.JWT_CLAIM}).`
      return reply.problem('forbidden', { detail })
    }
    const event = relay.toEvent(request.body)
    if (isTooLarge(event)) return reply.problem('invalid_request', { errors: [TOO_LONG] })
    // The body would take as much memory again while the event waits for Mixpanel.
    forgetBody(request)
    if (request.query.dry_run === '1') return reply.send(relay.preview(event))
    reply.logLine.insertId = event.insertId
    const isAsync = prefersAsync(request.headers.prefer)
    const isTrusted = isOpen || caller.kind === 'key'
    const verdict = await relay.identify(event, { isStrict: request.query.strict === '1', isAsync, isTrusted })
    reply.logLine.sent = verdict.sent
    if (verdict.code === 'accepted') return sendAccepted(reply)
    if (verdict.cause !== undefined) reply.logLine.details = { ...reply.logLine.details, cause: verdict.cause }
    if (hasFailed(verdict)) return reply.problem(...toProblem(verdict))
    return answerQueued(reply, isAsync).send({ status: 'queued' })
  })
}
